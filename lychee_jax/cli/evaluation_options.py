"""The options that all evaluations share, as dataclasses: each is written once, and is one parameter of a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lychee_jax.cli import options as shared
from lychee_jax.cli.console import load_model
from lychee_jax.errors import UserError

if TYPE_CHECKING:
    from lychee_jax.engine.options import GenerateOptions
    from lychee_jax.evaluation.variants import Variant
    from lychee_jax.llm import LLM
    from lychee_jax.text.chat import ChatOptions

ASKED, RUN = "What is asked", "The run"

DecodeLastOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Feed the last N tokens of every prompt one by one through the decode path, so that sparse heads matter "
        "for them too; 0: prompts are read densely.",
        rich_help_panel=shared.ATTENTION,
    ),
]
MessagesOption = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help='A JSON list of {"role": …, "content": …}: turns that stand before every question, as with --chat.',
        rich_help_panel=shared.CHAT,
    ),
]
BatchOption = Annotated[
    int, typer.Option(metavar="N", help="Prompts at a time; it changes no result.", rich_help_panel=RUN)
]


@dataclasses.dataclass(frozen=True)
class Chat:
    """How prompts become conversations."""

    chat: shared.ChatOption = False
    system: shared.SystemOption = None
    template_kwargs: shared.TemplateKwargsOption = None

    def options(self, messages: Path | None = None) -> ChatOptions | None:
        """The options of the chat, with turns from a file before every question; None: prompts are read as they are."""
        from lychee_jax.files import read_text
        from lychee_jax.text.chat import make_chat_options, parse_messages

        keywords = shared.template_kwargs_of(self.template_kwargs)
        turns = None if messages is None else parse_messages(read_text(messages), messages)
        return make_chat_options(chat=self.chat, system=self.system, messages=turns, template_kwargs=keywords)


@dataclasses.dataclass(frozen=True)
class Answering:
    """What answers: a model, and the variants of attention that are compared on the same prompts."""

    model: shared.ModelOption = None
    dtype: shared.DtypeOption = None
    quantize: shared.QuantizeOption = "none"
    quantize_head: shared.QuantizeHeadOption = False
    kv_dtype: shared.KVDtypeOption = "auto"
    tensor_parallel: shared.TensorParallelOption = 1
    implementation: shared.ImplementationOption = None
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            metavar="A,B,…",
            help="Some of [b]dense[/b], [b]hybrid[/b] and [b]auto[/b], all on the same prompts.",
            rich_help_panel=shared.ATTENTION,
        ),
    ] = "dense,hybrid"
    heads: shared.HeadsOption = None
    page_size: shared.PageSizeOption = 64
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="N,N,…",
            help="A head that does not retrieve reads at most this many tokens: numbers, or shares of the prompt's "
            "length such as [b]1/8[/b].",
            rich_help_panel=shared.ATTENTION,
        ),
    ] = "1/8"
    sink: shared.SinkOption = 128
    recent: shared.RecentOption = 256
    rule: shared.RuleOption = "budget"
    ratio: shared.RatioOption = 0.125
    top_p_mass: shared.TopPMassOption = 0.95
    threshold: shared.ThresholdOption = 0.001
    page_score: shared.PageScoreOption = "max"
    correct_every: shared.CorrectEveryOption = 0

    def variants(self) -> list[Variant]:
        """Every attention with every budget."""
        from lychee_jax.evaluation.variants import variants_of

        return variants_of(split_names("--attention", self.attention), split_names("--budget", self.budget))

    def options(self) -> GenerateOptions:
        """What all variants have in common; budgets are checked where variants and lengths are known."""
        from lychee_jax.attention.selection import SelectionPolicy
        from lychee_jax.engine.options import GenerateOptions

        size = self.page_size
        if size < 1:
            raise UserError(f"page size is {size}; it must be at least 1")
        enough = (-(-max(self.sink, 0) // size) - (-max(self.recent, 0) // size) + 1) * size
        policy = SelectionPolicy(
            enough, self.sink, self.recent, self.rule, self.ratio, self.top_p_mass, self.threshold, self.page_score
        )
        return GenerateOptions(
            policy=policy, page_size=size, correct_every=self.correct_every, implementation=self.implementation,
            kv_dtype=shared.kv_dtype_of(self.kv_dtype),
        )  # fmt: skip

    def load(self) -> tuple[LLM, GenerateOptions]:
        """The model, and the options with its head map and its ends of text; they are checked before it is loaded."""
        options = self.options()
        loaded = load_model(
            self.model, self.dtype, quantize=self.quantize, quantize_head=self.quantize_head,
            tensor_parallel=self.tensor_parallel, heads=self.heads,
        )  # fmt: skip
        return loaded, dataclasses.replace(options, heads=loaded.choose_heads(self.heads), eos_ids=loaded.eos_ids)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: for a parameter that is a dataclass, the fields of that dataclass."""
    written = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, type[Any]] = {
        name: each.annotation
        for name, each in written.items()
        if isinstance(each.annotation, type) and dataclasses.is_dataclass(each.annotation)
    }

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    seen: list[inspect.Parameter] = []
    for name, each in written.items():
        seen += _parameters(groups[name]) if name in groups else [each]
    run.__signature__ = inspect.Signature(seen)  # pyright: ignore[reportAttributeAccessIssue]  # what inspect looks at
    return run


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def split_names(option: str, text: str) -> list[str]:
    """The parts of a text that are separated by commas.

    Raises:
        UserError: there are none.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise UserError(f"{option} is empty; separate several with commas")
    return found


def whole_numbers(option: str, text: str) -> list[int]:
    """The same as numbers.

    Raises:
        UserError: there are none, or one that is no whole number above 0.
    """
    found = split_names(option, text)
    if bad := [name for name in found if not name.isdecimal() or int(name) < 1]:
        raise UserError(f"{option} has {bad[0]!r}; give whole numbers above 0, separated by commas")
    return [int(name) for name in found]
