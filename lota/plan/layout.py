"""How ranks stand on nodes and share the weights, and what a collective moves inside a node and over the network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class RankLayout:
    """Ranks, and what of the DeepSpeed configuration decides bytes.

    shard_group_size: ranks that share one copy of the weights in sparse training (None: all). bucket: entries of a
    reduction bucket. persistence_threshold: tensors below it stay gathered. live_parameters: DeepSpeed's
    stage3_max_live_parameters and stage3_max_reuse_distance, the smaller. communication_bytes: of a value of a compact
    gradient on its way, 4 or 2. offload_param: weights and compact state in host memory. Where None may be given, it is
    what `ds_configs/zero3.json` comes to for a model.
    """

    ranks: int = 1
    node_size: int | None = None
    shard_group_size: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    bucket: int | None = None
    persistence_threshold: int | None = None
    live_parameters: int = 1_000_000_000
    communication_bytes: int = 4
    offload_param: bool = False
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "node_size", "shard_group_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.communication_bytes not in (2, 4):
            raise ValueError(f"communication_bytes must be 4 (fp32) or 2 (bf16), got {self.communication_bytes!r}")
        if self.ranks % self.shard_size:
            fitting = [size for size in range(1, self.ranks + 1) if self.ranks % size == 0]
            raise ValueError(
                f"shard_group_size {self.shard_size} does not divide the {self.ranks} ranks; use one of {fitting}"
            )

    @property
    def shard_size(self) -> int:
        return self.ranks if self.shard_group_size is None else self.shard_group_size

    @property
    def ranks_per_node(self) -> int:
        return self.ranks if self.node_size is None else min(self.node_size, self.ranks)

    @property
    def num_nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    def shard_group(self) -> range:
        """Rank 0's shard group; the others are shifted copies."""
        return range(self.shard_size)

    def replica_group(self) -> range:
        """The ranks that own the same weights as rank 0."""
        return range(0, self.ranks, self.shard_size)

    def world(self) -> range:
        return range(self.ranks)


@dataclass(frozen=True)
class Transfer:
    """What one collective moves in a step. payload: bytes of the whole buffer, summed over its calls in a step.

    kind: `all_gather` (buffer: the gathered result), `reduce_scatter` (the input), `all_reduce`, `all_to_all` (a rank's
    whole input, its own share included).
    """

    what: str
    kind: str
    payload: int
    group: range

    def sent(self, ranks_per_node: int) -> tuple[int, int]:
        """Bytes that leave a rank inside its node and over the network, the mean over the ranks of its node.

        Gathers, reduce-scatters and all-reduces as rings move them: a piece crosses to another node once, whatever the
        number of ranks there. `all_to_all` sends each piece straight to its owner.
        """
        size = len(self.group)
        if size == 1 or self.payload == 0:
            return 0, 0
        on_nodes = Counter(rank // ranks_per_node for rank in self.group)
        nodes, together = len(on_nodes), max(on_nodes.values())
        total = self.payload * (size - 1) // size
        if self.kind == "all_to_all":
            across = self.payload * (size - together) // size
        else:
            across = self.payload * (nodes - 1) // nodes // together
        times = 2 if self.kind == "all_reduce" else 1
        return times * (total - across), times * across
