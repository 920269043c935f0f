"""How the ranks of an island divide a model and its batches, and which divisions are possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mycel.decisions.keeping import DIVIDED
from mycel.errors import ModelError, RecipeError
from mycel.recipe.schema import Layout

AXES = ("pipeline", "data", "sequence", "tensor")  # from the slowest link to the fastest: neighbours share tensors
ALONE = ("gpipe", "1f1b")  # schedules of one stage a rank, which with one rank are no order at all
SAVING = ("recompute", "activations", "activation_mib", "offload_optimizer")  # what a layout says of memory
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # whose forward is embedding, blocks, norm and head alone


def ranks_of(layout: Layout) -> int:
    """Processes that a layout takes."""
    return layout.data * layout.tensor * layout.pipeline * layout.sequence


def layout_of(layout: Layout, ranks: int) -> Layout:
    """How so many ranks share the work: by ``layout`` if it makes as many, else by rows."""
    if ranks_of(layout) == ranks:
        return layout
    return carried(layout, Layout(data=ranks))


def carried(layout: Layout, other: Layout) -> Layout:
    """Return another division with what ``layout`` says of memory and, where gradients cross, of their codec."""
    changes = {name: getattr(layout, name) for name in SAVING}
    if other.data * other.sequence > 1:
        changes["codec"] = layout.codec
    return other.model_copy(update=changes)


def check_layout(layout: Layout, ranks: int, config: Any, batch_size: int, length: int) -> None:
    """Refuse a layout that does not divide the ranks, the model, the batch or the rows.

    Parameters
    ----------
    config : transformers configuration
        Of the model that is laid out.
    batch_size, length : int
        Rows of a step over all ranks, and tokens of a row.

    Raises
    ------
    RecipeError
        One sentence that names the degree at fault and a value that would do.
    """
    named = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES)
    if ranks_of(layout) != ranks:
        raise RecipeError(
            f"layout has {named}, which makes {ranks_of(layout)} ranks, and there are {ranks}: "
            f"run with --nproc {ranks_of(layout)}, or change a degree"
        )
    heads = min(config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads))
    divided = {
        "tensor": (heads, "attention heads of keys and values"),
        "sequence": (length, "tokens of a row (data.max_length)"),
        "data": (batch_size, "rows of a step (training.batch_size)"),
    }
    for axis, (whole, what) in divided.items():
        degree = getattr(layout, axis)
        if whole % degree:
            near = max(number for number in range(1, degree) if whole % number == 0)
            raise RecipeError(f"layout.{axis} is {degree}, which does not divide the {whole} {what}: try {near}")
    if layout.tensor > 1 and config.model_type == "qwen3":
        raise RecipeError(
            f"layout.tensor is {layout.tensor}, and qwen3 norms queries by head, with weights that ranks would share: "
            "set it to 1"
        )
    if config.intermediate_size % layout.tensor:
        raise RecipeError(
            f"layout.tensor is {layout.tensor}, which does not divide the {config.intermediate_size} columns of the "
            "feed-forward part: try a divisor of it"
        )
    stages = layout.pipeline * layout.chunks
    if stages > config.num_hidden_layers:
        raise RecipeError(
            f"layout.pipeline is {layout.pipeline}, which makes {stages} stages, and the model has "
            f"{config.num_hidden_layers} blocks: try fewer ranks or layout.chunks"
        )
    stage_blocks(config.num_hidden_layers, stages, layout.blocks)
    check_family(config, length)
    _check_schedule(layout)
    _check_codec(layout)
    _check_memory(layout, config.num_hidden_layers)
    rows = batch_size // layout.data
    if rows % layout.micro_batches:
        raise RecipeError(
            f"layout.micro_batches is {layout.micro_batches}, which does not divide the {rows} rows that a data rank "
            "has of a step: try 1"
        )


def check_family(config: Any, length: int = 0) -> None:
    """Refuse a decoder that does more than pass hidden states through its blocks with causal attention and a head.

    Others scale, cap or mask in their model's own ``forward``, which ranks that hold parts of it do not run.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"the family {config.model_type!r} is none whose parts ranks can train: use one of {', '.join(FAMILIES)}, "
            "or train without layout and --nproc"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and window < length and "sliding_attention" in kinds:
        raise ModelError(
            f"the model attends to its last {window} tokens, and ranks attend to all {length} of a row: "
            f"set data.max_length to {window} or less"
        )


def _check_codec(layout: Layout) -> None:
    """Refuse codecs where no gradients cross between replicas, or where a rank holds only pieces of them."""
    if not layout.codec:
        return
    from mycel.wire.codecs import parse_codec

    try:
        parse_codec(layout.codec)
    except RecipeError as error:
        raise RecipeError(str(error).replace("wire.codec", "layout.codec")) from error
    if layout.tensor > 1:
        raise RecipeError(
            f"layout.tensor is {layout.tensor}, and layout.codec encodes whole gradients: set layout.tensor = 1"
        )
    if layout.data * layout.sequence == 1:
        raise RecipeError("layout.codec is set, and one rank sees every row: set layout.data above 1, or no codec")


def _check_memory(layout: Layout, blocks: int) -> None:
    """Refuse two ways with the same activations."""
    named = [
        name
        for name, given in (
            ("recompute", layout.recompute),
            ("activations", bool(layout.activations)),
            ("activation_mib", layout.activation_mib > 0),
        )
        if given
    ]
    if len(named) > 1:
        raise RecipeError(f"layout.{named[0]} and layout.{named[1]} both say what blocks leave: set one of them")
    if "selective" in layout.activations and layout.schedule in DIVIDED:
        raise RecipeError(
            f"layout.activations names selective, which goes back in one piece, and the schedule {layout.schedule} "
            "goes back in two: try recompute"
        )
    if len(layout.activations) not in {0, 1, blocks}:
        raise RecipeError(
            f"layout.activations has {len(layout.activations)} entries, and the model {blocks} blocks: "
            "give one for each, or one for all"
        )


def _check_schedule(layout: Layout) -> None:
    """Refuse a schedule that has no order for these stages and pieces."""
    wanted = {**dict.fromkeys(ALONE, 1), "zbv": 2}.get(layout.schedule, layout.chunks)
    if layout.chunks != wanted:
        raise RecipeError(
            f"layout.chunks is {layout.chunks}, and the schedule {layout.schedule} takes {wanted} stages a rank: "
            f"set it to {wanted}"
        )
    if layout.schedule not in ALONE and layout.pipeline == 1:
        raise RecipeError(
            f"layout.schedule is {layout.schedule}, an order of a pipeline, and layout.pipeline is 1: set it above 1, "
            'or schedule = "gpipe"'
        )
    pieces, ranks = layout.micro_batches, layout.pipeline
    if layout.schedule in {"gpipe", "breadth_first"}:
        return
    if pieces < ranks:
        raise RecipeError(
            f"layout.micro_batches is {pieces}, fewer than the {ranks} stages that the schedule {layout.schedule} "
            f'keeps busy: try {ranks}, or schedule = "gpipe"'
        )
    if layout.schedule in {"interleaved", "zero_bubble"} and pieces % (pieces // ranks):
        raise RecipeError(
            f"layout.micro_batches is {pieces}, which the schedule {layout.schedule} cannot take in equal rounds over "
            f"{ranks} ranks: try {pieces // ranks * ranks}"
        )


def layouts(ranks: int, config: Any, batch_size: int, length: int, micro_batches: int = 1) -> Iterator[Layout]:
    """Every layout that divides so many ranks and this model, the plainest first."""
    for pipeline in _divisors(ranks):
        for tensor in _divisors(ranks // pipeline):
            for sequence in _divisors(ranks // pipeline // tensor):
                data = ranks // pipeline // tensor // sequence
                made = micro_batches if pipeline > 1 else 1
                layout = Layout(data=data, tensor=tensor, pipeline=pipeline, sequence=sequence, micro_batches=made)
                try:
                    check_layout(layout, ranks, config, batch_size, length)
                except RecipeError:
                    continue
                yield layout


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def stages_of(layout: Layout, rank: int) -> list[int]:
    """Stages that a rank of a pipeline holds, of ``pipeline x chunks``: round by round, or for zbv there and back."""
    if layout.schedule == "zbv":
        return [rank, 2 * layout.pipeline - 1 - rank]
    return [rank + chunk * layout.pipeline for chunk in range(layout.chunks)]


def rank_of(layout: Layout, stage: int) -> int:
    """Rank along the pipeline that holds a stage."""
    return next(rank for rank in range(layout.pipeline) if stage in stages_of(layout, rank))


def stage_blocks(blocks: int, stages: int, shares: list[int] | None = None) -> list[range]:
    """Which blocks each stage holds: as equal as they come, the first stages one more, or by given ``shares``."""
    counts = shares or [blocks // stages + (stage < blocks % stages) for stage in range(stages)]
    if len(counts) != stages or sum(counts) != blocks or min(counts) < 1:
        raise RecipeError(f"layout.blocks is {counts}: {stages} numbers above zero that add up to {blocks} are needed")
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
