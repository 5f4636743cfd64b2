"""`lychee heads`: head maps as text and as pictures, and maps made of what other projects publish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lychee_jax.errors import UserError

if TYPE_CHECKING:
    from lychee_jax.attention.head_map import HeadMap

heads_app = typer.Typer(
    help="Look at a head map, which says what KV heads retrieve, or import one.", rich_markup_mode="rich"
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A head map (heads.json).")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR|HUB-ID",
        show_default="any model's maps are shown",
        help="Refuse a map that was not made for this checkpoint; its weights are not loaded.",
    ),
]


@heads_app.command("show")
def heads_show(
    file: FileArgument,
    model: ModelOption = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel",
            "--tensor-parallel-size",
            metavar="N",
            help="Also say how the heads are shared out among N devices, which need not be there.",
        ),
    ] = 1,
) -> None:
    """Print a head map: one line a layer, one mark a KV head.

    [b]Example[/b]

    [cyan]lychee heads show learned/heads.json --model my-8b[/cyan]

    [cyan]lychee heads show learned/heads.json --tensor-parallel 4[/cyan]
    """
    if tensor_parallel < 1:
        raise UserError(f"--tensor-parallel is {tensor_parallel}; it must be at least 1")
    head_map = _read(file, model)
    print_map(head_map, str(file))
    if tensor_parallel > 1:
        print_balance(head_map, tensor_parallel)


@heads_app.command("plot")
def heads_plot(
    file: FileArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PNG", show_default="FILE with .png", help="Where the picture goes."),
    ] = None,
    model: ModelOption = None,
) -> None:
    """Draw a head map as a PNG picture.

    [b]Example[/b]

    [cyan]lychee heads plot learned/heads.json --output roles.png[/cyan]
    """
    head_map = _read(file, model)
    from lychee_jax.plotting.attention import plot_heads

    target = output or file.with_suffix(".png")
    plot_heads(head_map, target)
    print(target)


@heads_app.command("import")
def heads_import(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="DuoAttention's full_attention_heads.tsv: a line for each layer, with a number from 0 to 1 for each "
            "KV head, separated by tabs.",
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of the checkpoint that the scores belong to; its weights are not loaded."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the head map goes.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE", show_default="0.5", help="Heads with at least this score retrieve, and all of layer 0."
        ),
    ] = None,
    retrieval_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Instead of a threshold: the N heads with the highest scores retrieve, all of layer 0 among them.",
        ),
    ] = None,
) -> None:
    """Make a head map of the scores that DuoAttention (arXiv 2410.10819) publishes for a model.

    [b]Example[/b]

    [cyan]lychee heads import full_attention_heads.tsv --model my-8b --output heads.json --retrieval-heads 32[/cyan]
    """
    from lychee_jax.loading import read_config
    from lychee_jax.maps.duo_attention import import_map

    label = model.expanduser().resolve().name
    head_map = import_map(file, read_config(model), label, threshold=threshold, retrieval_heads=retrieval_heads)
    head_map.save(output)
    print_map(head_map, str(output))


def print_map(head_map: HeadMap, name: str) -> None:
    """The roles of all heads on standard output, under the map's label or else `name`."""
    total = head_map.num_layers * head_map.num_kv_heads
    print(f"{head_map.model or name}: {head_map.num_retrieval} of {total} KV heads retrieve (■)")
    for layer, retrieval in enumerate(head_map.retrieval):
        marks = " ".join("■" if head in retrieval else "·" for head in range(head_map.num_kv_heads))
        print(f"layer {layer:>3}  {marks}")


def print_balance(head_map: HeadMap, devices: int) -> None:
    """Which heads each device gets, and how long layers wait for the device with most retrieval heads."""
    from lychee_jax.parallel.balance import balanced, slowest

    roles = head_map.roles
    places = balanced(head_map.num_kv_heads, devices, roles)
    in_order = balanced(head_map.num_kv_heads, devices)
    least = sum(-(-len(layer) // devices) for layer in head_map.retrieval)
    print(
        f"{devices} devices: the one with most retrieval heads of a layer has {slowest(places, devices, roles)} over "
        f"all layers, {least} if every layer divided evenly, {slowest(in_order, devices, roles)} in the model's order"
    )
    share = len(places) // devices
    for device in range(devices):
        own = [head for head in places[device * share : (device + 1) * share] if head >= 0]
        names = " ".join(map(str, own)) or "none"
        print(f"device {device:>2}  KV heads {names}: {int(roles[:, own].sum())} retrieve over all layers")


def _read(file: Path, model: str | None) -> HeadMap:
    from lychee_jax.attention.head_map import HeadMap

    if model is None:
        return HeadMap.load(file)
    from lychee_jax.loading import read_config

    return HeadMap.load(file, read_config(model))
