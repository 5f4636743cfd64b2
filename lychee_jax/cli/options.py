"""The options that several commands share: names, help, defaults. Nothing here imports JAX, so that --help is quick."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MODEL, ATTENTION, SAMPLING, CHAT = "Model", "Attention", "Sampling", "Chat"

Dtype = Literal["float32", "bfloat16", "float16"]
AttentionMode = Literal["auto", "hybrid", "dense"]
Rule = Literal["budget", "ratio", "top_p", "threshold", "forced"]
PageScore = Literal["max", "lse", "mass"]
Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu"]

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR|HUB-ID",
        show_default="the bundled model",
        help="Folder of a converted or a Hugging Face checkpoint, or a model on the Hugging Face Hub, which is "
        "downloaded.",
        rich_help_panel=MODEL,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        show_default="the checkpoint's",
        help="Of weights, activations and cache; float32 also computes products in full float32.",
        rich_help_panel=MODEL,
    ),
]
QuantizeOption = Annotated[
    Literal["none", "int8", "fp8"],
    typer.Option(
        help="Kernels of 8 bits, with a scale for each output channel; norms, biases and embedding stay as they are.",
        rich_help_panel=MODEL,
    ),
]
QuantizeHeadOption = Annotated[
    bool, typer.Option("--quantize-head", help="The output head, too.", rich_help_panel=MODEL)
]
TensorParallelOption = Annotated[
    int,
    typer.Option(
        "--tensor-parallel",
        "--tensor-parallel-size",  # vLLM's name
        metavar="N",
        help="Devices among which the model and its cache are divided.",
        rich_help_panel=MODEL,
    ),
]
KVDtypeOption = Annotated[
    Literal["auto", "fp8", "int8"],
    typer.Option(
        "--kv-dtype",
        "--kv-cache-dtype",  # vLLM's name
        help="Of the KV cache. [b]int8[/b] and [b]fp8[/b] (e4m3) take half the memory of bfloat16, int8 with a scale "
        "for every token and head. [b]auto[/b]: the dtype of the activations.",
        rich_help_panel=MODEL,
    ),
]
ImplementationOption = Annotated[
    Implementation | None,
    typer.Option(
        show_default="the best here",
        help="Kernels for decoding over the cache; a named one runs or fails, it never falls back. xla: none at all.",
        rich_help_panel=MODEL,
    ),
]
AttentionOption = Annotated[
    AttentionMode,
    typer.Option(
        help="[b]dense[/b]: every head reads the whole cache. [b]hybrid[/b]: retrieval heads do, and the others read "
        "the pages that these pick. [b]auto[/b]: hybrid, but dense while the text is too short for it to pay.",
        rich_help_panel=ATTENTION,
    ),
]
HeadsOption = Annotated[
    str | None,
    typer.Option(
        "--heads",
        metavar="FILE|all|none",
        show_default="heads.json in the model's folder, else the package's map for this config, else all",
        help="Which KV heads retrieve: a head map, [b]all[/b] (the dense result) or [b]none[/b] (only layer 0).",
        rich_help_panel=ATTENTION,
    ),
]
PAGE_SIZE_NAMES = ("--page-size", "--block-size")  # the latter is vLLM's
PageSizeOption = Annotated[
    int, typer.Option(*PAGE_SIZE_NAMES, help="Tokens in one page of the KV cache.", rich_help_panel=ATTENTION)
]
BudgetOption = Annotated[
    int,
    typer.Option(
        help="A head that does not retrieve reads at most this many tokens; a multiple of the page size.",
        rich_help_panel=ATTENTION,
    ),
]
SinkOption = Annotated[
    int, typer.Option(help="So many tokens at the start of the text are always read.", rich_help_panel=ATTENTION)
]
RecentOption = Annotated[
    int, typer.Option(help="So many tokens at the end of the text are always read.", rich_help_panel=ATTENTION)
]
RuleOption = Annotated[
    Rule,
    typer.Option(
        help="How many pages are picked, never more than the budget holds: as many as it holds, a [b]ratio[/b] of all "
        "pages, the fewest with [b]top_p[/b] of the attention, those above a [b]threshold[/b], or only the "
        "[b]forced[/b] ones (sink and recent).",
        rich_help_panel=ATTENTION,
    ),
]
RatioOption = Annotated[
    float, typer.Option(help="For --rule ratio: the share of all pages that is read.", rich_help_panel=ATTENTION)
]
TopPMassOption = Annotated[
    float,
    typer.Option(
        help="For --rule top_p: the share of the attention that the pages read must hold.", rich_help_panel=ATTENTION
    ),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        help="For --rule threshold: pages with at least this share of the attention are read.",
        rich_help_panel=ATTENTION,
    ),
]
PageScoreOption = Annotated[
    PageScore,
    typer.Option(
        help="What ranks a page: its best token ([b]max[/b]) or all of its attention ([b]lse[/b] or [b]mass[/b]).",
        rich_help_panel=ATTENTION,
    ),
]
CorrectEveryOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Every N tokens, compute the newest N again with dense attention to correct the cache; 0: never.",
        rich_help_panel=ATTENTION,
    ),
]
ChatOption = Annotated[
    bool,
    typer.Option("--chat", help="Put the text through the checkpoint's chat template.", rich_help_panel=CHAT),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="The system message of the chat.", rich_help_panel=CHAT),
]
TemplateKwargsOption = Annotated[
    str | None,
    typer.Option(
        "--template-kwargs",
        metavar="JSON",
        help="""Keywords for the chat template: '{"enable_thinking": false}' turns Qwen3's thinking off.""",
        rich_help_panel=CHAT,
    ),
]


def kv_dtype_of(choice: Literal["auto", "fp8", "int8"]) -> Literal["fp8", "int8"] | None:
    """What --kv-dtype says to the engine."""
    return None if choice == "auto" else choice


def model_name(model: str | None) -> str:
    """What a model is called that --model names: the last part of a path or of a hub id."""
    return Path(model).expanduser().resolve().name if model is not None else "lychee"


def template_kwargs_of(text: str | None) -> dict[str, Any] | None:
    """The object that --template-kwargs holds.

    Raises:
        UserError: no JSON, no object, or a keyword that is not the user's to set.
    """
    from lychee_jax.files import parse_json
    from lychee_jax.text.chat import check_template_kwargs

    return None if text is None else check_template_kwargs(parse_json(text, "--template-kwargs"))
