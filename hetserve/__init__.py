"""HetServe's face: what a user of a running server imports. Needs httpx alone; the server's folders are not imported here.

from hetserve import Client

with Client("http://127.0.0.1:8000") as client:
    print(client.completions("Once upon a time", max_tokens=32).text)
"""

from hetserve._version import __version__
from hetserve.async_client import AsyncClient
from hetserve.client import Client
from hetserve.errors import (
    APIError,
    BadRequest,
    ConnectionFailed,
    InvalidArgument,
    InvalidResponse,
    NotFound,
    RateLimited,
    ServerError,
    StatusError,
    StreamError,
    TimedOut,
    Unauthorized,
)
from hetserve.exchange import Timeouts
from hetserve.retries import Retries
from hetserve.streams import AsyncStream, Stream
from hetserve.types import (
    Choice,
    Chunk,
    Completion,
    Health,
    Instance,
    Message,
    Model,
    Tokenization,
    TokenLogprob,
    TopLogprob,
    Trace,
    Usage,
)

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionFailed",
    "Health",
    "Instance",
    "InvalidArgument",
    "InvalidResponse",
    "Message",
    "Model",
    "NotFound",
    "RateLimited",
    "Retries",
    "ServerError",
    "StatusError",
    "Stream",
    "StreamError",
    "TimedOut",
    "Timeouts",
    "TokenLogprob",
    "Tokenization",
    "TopLogprob",
    "Trace",
    "Unauthorized",
    "Usage",
    "__version__",
]
