"""The same toy models as the engine's tests."""

from tests.engine.conftest import _quiet_transformers as _quiet_transformers
from tests.engine.conftest import model_folder as model_folder
