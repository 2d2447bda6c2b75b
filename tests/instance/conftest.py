"""An instance is held without Ray: starting it from one of these tests is an error."""

from tests.cluster.conftest import _no_ray as _no_ray
from tests.cluster.conftest import configure as configure
from tests.cluster.conftest import model_folder as model_folder
