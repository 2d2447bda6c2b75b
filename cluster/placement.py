"""Which node each member of the cluster goes to, and what its actor asks Ray for. Pure: nodes in, placements out.

Every placement names its node, so that an instance knows before it starts how many others share its cores, and so that a
pool that cannot be placed is an error at once instead of an actor pending in Ray for ever.

Neighbours: `cluster.ray_session` reads the nodes from Ray, `cluster.controller` carries placements out and asks for a new one
when a member has to be replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from core.config import ClusterConfig, PoolConfig
from core.errors import NoSuchAccelerator

ACCELERATOR_LABEL = "ray.io/accelerator-type"
NODE_LABEL = "ray.io/node-id"
CPU_ONLY = "CPU"
LOOPBACK = "127.0.0.1"
_EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """One Ray node. `total` and `free` are its resources, by Ray's names; `address` is reachable from the other nodes."""

    node_id: str
    name: str
    address: str
    labels: dict[str, str] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)

    @property
    def accelerator(self) -> str:
        """Ray's accelerator type, or `CPU` for a node without one."""
        return self.labels.get(ACCELERATOR_LABEL, CPU_ONLY)


@dataclass(frozen=True)
class Member:
    """One instance that should exist: the pool it belongs to, by index in `config.pools`, and a name unique in the cluster."""

    name: str
    pool: int


@dataclass(frozen=True)
class Placement:
    """Where one member runs and what its actor asks for.

    Attributes:
        accelerator: what it runs on, in the words of `core.hardware`; `CPU` when it holds no GPU on an unlabelled node.
        device: `cuda` when it holds a GPU or a share of one, else `cpu`.
        threads: CPU threads for compute.
        host: address to listen on: loopback when the whole cluster is one machine.
        resources: everything held, by Ray's names, `CPU` and `GPU` included.
    """

    member: Member
    node_id: str
    node: str
    host: str
    accelerator: str
    device: str
    threads: int
    resources: dict[str, float]
    label_selector: dict[str, str]

    def actor_options(self) -> dict[str, object]:
        """Arguments of Ray's `ActorClass.options`."""
        custom = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self.resources.get("CPU", 0),
            "num_gpus": self.resources.get("GPU", 0),
            "resources": custom or None,
            "label_selector": self.label_selector,
        }


def members_of(config: ClusterConfig) -> list[Member]:
    """Every instance the configuration asks for, named `<pool>-<index>`."""
    return [
        Member(f"{config.pool_name(index)}-{replica}", index)
        for index, pool in enumerate(config.pools)
        for replica in range(pool.replicas)
    ]


def place(
    config: ClusterConfig, nodes: Sequence[Node], members: Iterable[Member] | None = None, placed: Iterable[Placement] = ()
) -> dict[str, Placement]:
    """Assign `members` (default: all of them) to nodes, beside those already `placed`.

    Members with the fewest possible nodes choose first; each takes the possible node with the fewest instances per core,
    and of equals the one with the most cores.
    The cores of a node are divided among the instances that share it. `free` of the nodes must not count what this call
    places, and must already be less what `placed` hold.

    Raises:
        NoSuchAccelerator: naming the pool, what it asked for, and what the cluster has.
    """
    members = members_of(config) if members is None else list(members)
    free = {node.node_id: dict(node.free) for node in nodes}
    sharing = Counter(placement.node_id for placement in placed)
    matching = {index: _matching(config, index, nodes) for index in {member.pool for member in members}}
    chosen: dict[str, Node] = {}
    for member in sorted(members, key=lambda member: len(matching[member.pool])):
        node = _choose(matching[member.pool], config.pools[member.pool], free, sharing)
        if node is None:
            raise NoSuchAccelerator(_no_room(config, member, members, nodes))
        chosen[member.name] = node
        sharing[node.node_id] += 1
        for name, amount in _wanted(config.pools[member.pool]).items():
            free[node.node_id][name] = free[node.node_id].get(name, 0.0) - amount
    one_machine = len({node.address for node in nodes}) == 1
    return {
        member.name: _placement(config, member, chosen[member.name], sharing[chosen[member.name].node_id], one_machine)
        for member in members
    }


def _placement(config: ClusterConfig, member: Member, node: Node, sharing: int, one_machine: bool) -> Placement:
    pool = config.pools[member.pool]
    selector = {**pool.labels, NODE_LABEL: node.node_id}
    accelerators = _accelerators(pool)
    if accelerators and CPU_ONLY not in accelerators:  # CPU nodes carry no such label
        selector[ACCELERATOR_LABEL] = accelerators[0] if len(accelerators) == 1 else f"in({','.join(accelerators)})"
    cores = max(1, int(node.total.get("CPU", 1)))
    return Placement(
        member=member,
        node_id=node.node_id,
        node=node.name,
        host=LOOPBACK if one_machine else node.address,
        accelerator=node.accelerator,
        device="cuda" if pool.resources.gpus > 0 else "cpu",
        threads=config.engine_of(pool).threads or max(1, cores // sharing),
        resources=_wanted(pool),
        label_selector=selector,
    )


def _choose(candidates: list[Node], pool: PoolConfig, free: dict[str, dict[str, float]], sharing: Counter[str]) -> Node | None:
    wanted = _wanted(pool)
    fitting = [node for node in candidates if _fits(wanted, free[node.node_id])]
    if not fitting:
        return None

    def crowding(node: Node) -> tuple[float, float, str]:
        cores = max(1.0, node.total.get("CPU", 1.0))
        return sharing[node.node_id] / cores, -cores, node.node_id

    return min(fitting, key=crowding)


def _matching(config: ClusterConfig, index: int, nodes: Sequence[Node]) -> list[Node]:
    """Nodes that could hold one instance of the pool were they empty. Raises NoSuchAccelerator if there are none."""
    pool = config.pools[index]
    found = [node for node in nodes if _matches(pool, node)]
    if not found:
        raise NoSuchAccelerator(f"pools[{index}]: asked for {_asked(pool)}, but the cluster has {_inventory(nodes)}")
    return found


def _matches(pool: PoolConfig, node: Node) -> bool:
    accelerators = _accelerators(pool)
    if accelerators and node.accelerator not in accelerators:
        return False
    if any(node.labels.get(key) != value for key, value in pool.labels.items()):
        return False
    if not accelerators and not _wanted(pool) and not node.total.get("CPU"):
        return False  # a node started with no CPUs is Ray's way of saying that no work belongs there
    return _fits(_wanted(pool), node.total)


def _accelerators(pool: PoolConfig) -> list[str]:
    if pool.accelerator is None:
        return []
    return [pool.accelerator] if isinstance(pool.accelerator, str) else pool.accelerator


def _wanted(pool: PoolConfig) -> dict[str, float]:
    asked = {"CPU": pool.resources.cpus, "GPU": pool.resources.gpus, **pool.resources.custom}
    return {name: amount for name, amount in asked.items() if amount > 0}


def _fits(wanted: dict[str, float], free: dict[str, float]) -> bool:
    return all(free.get(name, 0.0) + _EPSILON >= amount for name, amount in wanted.items())


# --- words for errors -------------------------------------------------------------------------------------------------


def _no_room(config: ClusterConfig, member: Member, members: Sequence[Member], nodes: Sequence[Node]) -> str:
    pool = config.pools[member.pool]
    twins = sum(other.pool == member.pool for other in members)
    held = "" if all(node.free == node.total for node in nodes) else f", of which now free: {_inventory(nodes, free=True)}"
    return (
        f"pools[{member.pool}]: no room for all {twins} of its instances, each of which asks for {_asked(pool)}; "
        f"the cluster has {_inventory(nodes)}{held}"
    )


def _asked(pool: PoolConfig) -> str:
    parts = [f"{amount:g} {name}" for name, amount in _wanted(pool).items()]
    if accelerators := _accelerators(pool):
        parts.append(f"accelerator {' or '.join(accelerators)}")
    parts += [f"label {key}={value}" for key, value in pool.labels.items()]
    return ", ".join(parts) or "a node with at least one CPU"


def _inventory(nodes: Sequence[Node], free: bool = False) -> str:
    """`2 nodes with accelerator L40S (16 CPU, 1 GPU each)`, one phrase per kind of node."""
    kinds = Counter((node.accelerator, _countable(node.free if free else node.total)) for node in nodes)
    phrases = []
    for (accelerator, held), count in sorted(kinds.items()):
        number, each = (f"{count} nodes", " each") if count > 1 else ("1 node", "")
        phrases.append(f"{number} with accelerator {accelerator} ({held or 'nothing'}{each})")
    return "; ".join(phrases) or "no nodes"


def _countable(resources: dict[str, float]) -> str:
    own = ("memory", "object_store_memory")
    shown = sorted((name, amount) for name, amount in resources.items() if name not in own and ":" not in name)
    return ", ".join(f"{amount:g} {name}" for name, amount in shown)
