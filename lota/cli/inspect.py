"""`lota inspect`: what a ticket or mask is, of which base, how large, and where its entries lie."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lota.cli.parsers import add_command
from lota.messages import printable

if TYPE_CHECKING:
    from lota.ticket.manifest import Manifest

_MAX_ROWS = 16  # layers in the table; neighbours share a row beyond


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        run,
        summary="print what a ticket or mask holds: its base, size, and density per layer",
        text="""
Print what a ticket (or a mask) holds: how many entries of which tensors, its base, how it was made, its size on disk,
and the density per layer and kind of tensor.

Opening a ticket checks everything but its values against checksums; --verify checks the values too.""",
        examples="""
lota inspect runs/gsm8k/ticket
lota inspect runs/gsm8k/ticket --verify
lota inspect runs/gsm8k/ticket --json | python -m json.tool""",
    )
    parser.add_argument("ticket", type=Path, help="directory of a ticket or mask")
    parser.add_argument("--verify", action="store_true", help="read everything: indices, values, base values, counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text, with every tensor")


def run(args: argparse.Namespace) -> None:
    from lota.ticket import Mask, Ticket, read_manifest

    manifest = read_manifest(args.ticket)
    opened = Ticket.load(args.ticket) if manifest.has_values else Mask.load(args.ticket)
    if args.verify:
        if isinstance(opened, Ticket):
            opened.verify()
        else:
            for name in opened.names:
                opened.indices(name)
    facts = describe(args.ticket, manifest) | {"verified": args.verify}
    print(json.dumps(facts, indent=2) if args.json else "\n".join(report(facts)))


def describe(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Everything in ticket.json, and the sizes of the files, as JSON can hold it."""
    from lota.retention import FILE_NAME
    from lota.ticket.hub import local_directory
    from lota.ticket.manifest import MANIFEST_NAME

    files = sorted({record.file for record in manifest.tensors})
    directory = local_directory(path)
    num_bytes = sum((directory / file).stat().st_size for file in (MANIFEST_NAME, *files))
    importance = directory / FILE_NAME
    tensors = {
        record.name: {
            "shape": list(record.shape),
            "num_active": record.num_active,
            "density": record.num_active / record.eligible if record.eligible else 0.0,
            "dtype": record.values_dtype,
            "base_dtype": record.base.dtype if record.base else record.base_values_dtype,
            "base_fingerprint": record.base.fingerprint if record.base else None,
            "base_rows": record.base.rows if record.base else None,
            "rows": list(record.rows) if record.rows else None,
        }
        for record in manifest.tensors
    }
    return {
        "path": str(path),
        "kind": "ticket" if manifest.has_values else "mask",
        "num_active": manifest.num_active,
        "eligible": manifest.eligible,
        "density": manifest.num_active / manifest.eligible if manifest.eligible else 0.0,
        "num_changed": manifest.num_changed,
        "has_base_values": manifest.has_base_values,
        "dtypes": sorted({str(record.values_dtype) for record in manifest.tensors if record.values_dtype}),
        "base_dtypes": sorted({str(facts["base_dtype"]) for facts in tensors.values() if facts["base_dtype"]}),
        "has_fingerprints": any(record.base is not None for record in manifest.tensors),
        "num_bytes": num_bytes,
        "importance_bytes": importance.stat().st_size if importance.is_file() else 0,
        "bits_per_eligible_weight": 8 * num_bytes / manifest.eligible if manifest.eligible else 0.0,
        "index_bound": _index_bound(manifest),
        "is_packed": any(record.difference and record.values_dtype is None for record in manifest.tensors),
        "files": [MANIFEST_NAME, *files],
        "provenance": manifest.provenance,
        "model": manifest.model,
        "num_frozen": len(manifest.frozen),
        "num_dense": sum(record.num_active for record in manifest.tensors if record.is_dense),
        "tensors": tensors,
    }


def _index_bound(manifest: Manifest) -> float:
    """Bits per eligible weight that no code for the positions can go below, if all of a tensor's are as likely."""
    bits = 0.0
    for record in manifest.tensors:
        share = record.num_active / record.numel if record.numel else 0.0
        if 0 < share < 1:
            bits -= record.numel * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    return bits / manifest.eligible if manifest.eligible else 0.0


def report(facts: dict[str, Any]) -> list[str]:
    """The same facts as lines to read."""
    active, changed = facts["num_active"], facts["num_changed"]
    lines = [
        f"{facts['kind']:<12}{printable(facts['path'])}" + (", everything verified" if facts["verified"] else ""),
        f"{'density':<12}{facts['density']:.8g}: {active:,} of {facts['eligible']:,} eligible entries in "
        f"{len(facts['tensors'])} tensors",
        f"{'size':<12}{facts['num_bytes']:,} bytes, {facts['bits_per_eligible_weight']:.3f} bits per eligible weight "
        f"(where the entries are takes {facts['index_bound']:.3f} at least)",
    ]
    if facts["kind"] == "ticket":
        undo = "with base values, so it can be taken out again" if facts["has_base_values"] else "without base values"
        dtypes = ", ".join(facts["dtypes"])
        if facts["is_packed"]:
            dtypes, undo = ", ".join(facts["base_dtypes"]), "packed as differences to the base's, which give both"
        lines.append(f"{'values':<12}{dtypes}; {undo}")
    if facts["importance_bytes"]:
        size = f"{facts['importance_bytes']:,} bytes"
        lines.append(f"{'importance':<12}of every weight to this ticket's task, in {size}: later tasks can retain it")
    if changed is not None:
        lines.append(f"{'changed':<12}{changed:,} values differ from the base's" + _share(changed, active))
    known = "fingerprint of every tensor" if facts["has_fingerprints"] else "no fingerprints: any base is accepted"
    if facts["has_fingerprints"]:
        rest = f"{facts['num_frozen']} frozen ones too" if facts["num_frozen"] else "frozen ones are not known"
        known = f"fingerprint of every tensor it names; {rest}"
    lines.append(f"{'base':<12}{', '.join(facts['base_dtypes']) or 'unknown dtype'}; {known}")
    brought = [name for name, tensor in facts["tensors"].items() if tensor["base_rows"] is not None]
    if brought:
        kind = str(facts["model"].get("class", "model"))
        lines.append(f"{'brings':<12}{printable(', '.join(brought))}, for a {printable(kind)}")
    if facts["provenance"]:
        shown = {printable(key): printable(_plain(value)) for key, value in facts["provenance"].items()}
        lines += ["", "provenance", *(f"  {key:<18}{value}" for key, value in shown.items())]
    return [*lines, "", *table({name: (t["num_active"], _numel(t["shape"])) for name, t in facts["tensors"].items()})]


def table(counts: dict[str, tuple[int, int]], max_rows: int = _MAX_ROWS) -> list[str]:
    """Density per layer and kind of tensor, in percent; a dot where there is no such tensor."""
    from lota.ticket.density_grid import density_grid

    grid = density_grid(counts, max_rows)
    header = ["layer", *map(printable, grid.columns), "all"]
    rows = [
        [printable(row), *map(_percent, cells), _percent(density)]
        for row, cells, density in zip(grid.rows, grid.cells, grid.row_density)
    ]
    rows.append(["all", *map(_percent, grid.column_density), ""])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    return ["density in percent", *(f"  {line.rstrip()}" for line in aligned)]


def _percent(density: float | None) -> str:
    return "." if density is None else f"{100 * density:.3g}"


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.2%} of the active)" if whole else ""


def _numel(shape: list[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return json.dumps(value) if isinstance(value, list) else str(value)
