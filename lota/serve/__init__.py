"""A served model that switches tickets: a backend for vLLM's weight transfer, and the client that drives it.

`plugin` is what vLLM finds by itself; `engine` is the backend in vLLM's workers, and imports vllm; `served` verifies
and writes, `placement` finds entries in a running model; `control` and `http` are the client's.
"""

from lota.serve.control import OfflineServer, ServerBroken, Status, as_server_knows, status, switch
from lota.serve.http import Refused, Server, Unreachable

__all__ = [
    "OfflineServer",
    "Refused",
    "Server",
    "ServerBroken",
    "Status",
    "Unreachable",
    "as_server_knows",
    "status",
    "switch",
]
