"""`serve build serve.application:app`: the application as an object, its arguments from the environment.

`serve build` of Ray 2.60 takes no function of arguments as `serve.deployment:app` is one. TDRO_SERVE holds the arguments
(`deployment.Args`) as JSON, where the file is built and, by the `runtime_env` of the built file, where it is deployed:

    TDRO_SERVE='{"model": "/models/best", "index": "/index"}' serve build serve.application:app -o built.yaml
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationError

from tdro_ray.errors import ConfigError

VARIABLE = "TDRO_SERVE"


def __getattr__(name: str) -> Any:
    """Return `app`, made when it is asked for: importing this module does nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve import deployment

    given = os.environ.get(VARIABLE, "")
    try:
        return deployment.app(deployment.Args.model_validate_json(given or "{}"))
    except ValidationError as err:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the value'}: {e['msg']}" for e in err.errors()[:5])
        raise ConfigError(
            f"{VARIABLE}={given[:200]!r} does not say what to serve: {problems}. Valid is JSON such as "
            '{"model": "/models/best", "index": "/index", "num_replicas": 2}.'
        ) from err
