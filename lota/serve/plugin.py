"""What vLLM calls in every process of a server (entry point `vllm.general_plugins`): the backend gets its name."""

from __future__ import annotations

BACKEND = "lota"


def register() -> None:
    """Have `--weight-transfer-config '{"backend": "lota"}'` mean ours. May be called several times."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "lota.serve.engine", "TicketEngine")
    except ValueError as error:
        if "already registered" not in str(error):
            raise
