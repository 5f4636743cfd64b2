"""`lychee generate`: a prompt in, its continuation out, as text that streams or as one JSON object."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lychee_jax.cli import options as shared
from lychee_jax.cli.console import Stages, load_model, reading, stages
from lychee_jax.errors import UserError
from lychee_jax.files import decode_text, json_text, parse_json, read_text

if TYPE_CHECKING:
    from pathlib import Path

    from lychee_jax.attention.head_map import HeadMap
    from lychee_jax.config import ModelConfig
    from lychee_jax.engine.outputs import Result
    from lychee_jax.engine.stream import TokenStream
    from lychee_jax.parallel.layouts import Layout
    from lychee_jax.text.streaming import TextStream

_PROMPT, _OUTPUT = "Prompt (exactly one source)", "Output"


def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt itself.", rich_help_panel=_PROMPT),
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A UTF-8 text file; [b]-[/b] is standard input.", rich_help_panel=_PROMPT),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A JSON list of token ids, or a list of such lists (a batch), used as they are: no BOS is added and "
            "no tokenizer needed. [b]-[/b] is standard input.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    messages: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help='A JSON list of {"role": …, "content": …}: a conversation for the chat template, as with --chat. '
            "[b]-[/b] is standard input.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    chat: shared.ChatOption = False,
    system: shared.SystemOption = None,
    template_kwargs: shared.TemplateKwargsOption = None,
    model: shared.ModelOption = None,
    dtype: shared.DtypeOption = None,
    quantize: shared.QuantizeOption = "none",
    quantize_head: shared.QuantizeHeadOption = False,
    kv_dtype: shared.KVDtypeOption = "auto",
    tensor_parallel: shared.TensorParallelOption = 1,
    implementation: shared.ImplementationOption = None,
    attention: shared.AttentionOption = "auto",
    heads: shared.HeadsOption = None,
    page_size: shared.PageSizeOption = 64,
    budget: shared.BudgetOption = 4096,
    sink: shared.SinkOption = 128,
    recent: shared.RecentOption = 256,
    rule: shared.RuleOption = "budget",
    ratio: shared.RatioOption = 0.125,
    top_p_mass: shared.TopPMassOption = 0.95,
    threshold: shared.ThresholdOption = 0.001,
    page_score: shared.PageScoreOption = "max",
    correct_every: shared.CorrectEveryOption = 0,
    temperature: Annotated[
        float,
        typer.Option(help="0 is greedy: always the likeliest token.", rich_help_panel=shared.SAMPLING),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.", rich_help_panel=shared.SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Of those, keep the fewest likeliest that hold this probability.", rich_help_panel=shared.SAMPLING
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Of those, keep tokens at least this many times as likely as the likeliest.",
            rich_help_panel=shared.SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            help="Above 1: tokens of the prompt and of the text so far become less likely.",
            rich_help_panel=shared.SAMPLING,
        ),
    ] = 1.0,
    presence_penalty: Annotated[
        float,
        typer.Option(
            help="Taken off the logits of tokens in the text so far, from -2 to 2.", rich_help_panel=shared.SAMPLING
        ),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(help="The same, as often as the token is in the text so far.", rich_help_panel=shared.SAMPLING),
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=NUMBER",
            help="Added to a token's logit, from -100 to 100; may be given several times.",
            rich_help_panel=shared.SAMPLING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.", rich_help_panel=shared.SAMPLING)] = 0,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "--max-tokens",
            metavar="N",
            help="Tokens to generate at most.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 128,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text, or at this special token; may be given several times.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="End-of-text tokens do not end it.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object on standard output: tokens, log-probabilities, text, timing, attention.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Continue a prompt.

    Text appears as it is generated; a closing line with statistics goes to standard error.

    [b]Examples[/b]

    [cyan]lychee generate --model my-8b --prompt-file book.txt --max-new-tokens 200[/cyan]

    [cyan]lychee generate --model my-8b --chat -p "Name three rivers" --temperature 0.7 --top-p 0.9[/cyan]

    [cyan]lychee generate --model my-8b --prompt-ids ids.json --attention hybrid --budget 2048 --json[/cyan]
    """
    from lychee_jax.arguments import as_stops
    from lychee_jax.attention.selection import SelectionPolicy
    from lychee_jax.engine.options import GenerateOptions
    from lychee_jax.engine.sampling_params import SamplingParams
    from lychee_jax.llm import choose_heads, prepare
    from lychee_jax.text.chat import make_chat_options
    from lychee_jax.text.prompts import encode_prompts
    from lychee_jax.text.streaming import TextStream
    from lychee_jax.text.tokenizer import Tokenizer

    # Everything that can be refused without the model is looked at before it is loaded.
    source = read_prompt(prompt or [], prompt_file or [], prompt_ids or [], messages or [], chat=chat)
    keywords = shared.template_kwargs_of(template_kwargs)
    make_chat_options(chat=chat, system=system, messages=source.messages, template_kwargs=keywords)
    stops = as_stops(stop)
    options = GenerateOptions(
        attention=attention,
        policy=SelectionPolicy(budget, sink, recent, rule, ratio, top_p_mass, threshold, page_score),
        page_size=page_size,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            presence_penalty,
            frequency_penalty,
            _biases(logit_bias or []),
        ),
        ignore_eos=ignore_eos,
        correct_every=correct_every,
        implementation=implementation,
        kv_dtype=shared.kv_dtype_of(kv_dtype),
    )
    prompts: list[list[int]] = []

    def encode(
        folder: Path, config: ModelConfig, own: HeadMap | None, eos_ids: tuple[int, ...], layout: Layout | None
    ) -> None:
        """Everything that needs no weights; programs compile while these are read."""
        nonlocal options, prompts
        options = dataclasses.replace(options, heads=choose_heads(config, own, heads), eos_ids=eos_ids)
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None and source.ids is None:
            raise UserError(f"{folder} has no tokenizer; give token ids with --prompt-ids")
        if tokenizer is None and stops:
            raise UserError(f"--stop needs a tokenizer, and {folder} has none")
        prompts = encode_prompts(
            tokenizer,
            source.ids if source.text is None else source.text,
            chat=chat,
            system=system,
            messages=source.messages,
            template_kwargs=keywords,
            model=folder,
        )
        prepare(config, prompts, options, layout=layout)
        if heads is None and own is None and attention != "dense":
            print(f"notice: {folder} has no heads.json, so every head retrieves (--heads all)", file=sys.stderr)

    with stages() as bars:
        loaded = load_model(
            model, dtype, encode, bars, quantize=quantize, quantize_head=quantize_head,
            tensor_parallel=tensor_parallel, heads=heads,
        )  # fmt: skip
        tokenizer = loaded.tokenizer
        eos_ids = () if ignore_eos else loaded.eos_ids
        texts = [TextStream(tokenizer, stops, eos_ids) for _ in prompts] if tokenizer is not None else None
        stream = loaded.stream_tokens(prompts, options, on_prefill=reading(bars))
        result = _follow(stream, texts, bars, live=len(prompts) == 1 and not as_json)
    if as_json:
        print(json_text(_as_json(prompts, result, texts)))
        return
    if len(prompts) > 1:
        for row, tokens in enumerate(result.tokens):
            print(f"[{row}] {texts[row].text if texts else ' '.join(map(str, tokens))}")
    print(_statistics(prompts, result), file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Source:
    """The one prompt that was given: a text, a conversation, or rows of token ids."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    ids: list[list[int]] | None = None


def read_prompt(
    texts: list[str], files: list[str], id_files: list[str], message_files: list[str], *, chat: bool
) -> Source:
    """The one prompt that was given.

    Raises:
        UserError: none or several sources, an unreadable file, an empty prompt, ids that are not whole numbers, or
            messages without role or text.
    """
    from lychee_jax.text.chat import parse_messages

    count = len(texts) + len(files) + len(id_files) + len(message_files)
    if count != 1:
        raise UserError(
            f"give exactly one of --prompt, --prompt-file, --prompt-ids and --messages, not {count or 'none'}"
        )
    if id_files:
        if chat:
            raise UserError("--chat needs text: token ids are used as they are")
        return Source(ids=_token_ids(id_files[0], _read(id_files[0])))
    if message_files:
        return Source(messages=parse_messages(_read(message_files[0]), message_files[0]))
    text = texts[0] if texts else _read(files[0])
    if not text:
        raise UserError("the prompt is empty" + (f": {files[0]}" if files else ""))
    return Source(text)


def _biases(options: list[str]) -> tuple[tuple[int, float], ...]:
    """The pairs of --logit-bias."""
    pairs = []
    for option in options:
        token, _, value = option.partition("=")
        try:
            pairs.append((int(token), float(value)))
        except ValueError:
            raise UserError(f"--logit-bias is {option!r}; give a token id and a number, such as 128=-5") from None
    return tuple(pairs)


def _read(name: str) -> str:
    """Exact text of a file or of standard input: no newline is translated or dropped, only a byte order mark is."""
    return decode_text(sys.stdin.buffer.read(), "standard input") if name == "-" else read_text(name)


def _token_ids(name: str, text: str) -> list[list[int]]:
    rows = parse_json(text, name)
    if isinstance(rows, list) and not any(isinstance(row, list) for row in rows):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise UserError(f"{name} must hold a JSON list of token ids, or a list of such lists")
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"{name}: row {number} is empty; every prompt needs at least one token")
        for token in row:
            if type(token) is not int:  # true is an int to Python
                raise UserError(f"{name}: row {number} has {json_text(token)}; token ids are whole numbers")
    return rows


def _follow(stream: TokenStream, texts: list[TextStream] | None, bars: Stages, *, live: bool) -> Result:
    """Take a generation to its end, stop strings included; with `live`, show its only row as it comes."""
    show: Callable[[str], Any] = sys.stdout.write if live else len
    for row, output in stream:
        if live:
            bars.stop()
        for count, token in enumerate(output.tokens, 1):
            if texts is None:
                show(f"{token} ")
                continue
            show(texts[row].push(token))
            if texts[row].stopped:
                stream.finish(row, unused=len(output.tokens) - count)
                break
        sys.stdout.flush()
    for text in texts or ():
        show(text.finish())
    if live:
        print(flush=True)
    return stream.result()


def _as_json(prompts: list[list[int]], result: Result, texts: list[TextStream] | None) -> dict[str, Any]:
    return {
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "tokens": result.tokens,
        "logprobs": result.logprobs,
        "text": [text.text for text in texts] if texts is not None else None,
        "finish_reason": result.finish_reason,
        "timing": dataclasses.asdict(result.timing),
        "attention": dataclasses.asdict(result.attention),
    }


def _statistics(prompts: list[list[int]], result: Result) -> str:
    timing, attention = result.timing, result.attention
    prompt, new = sum(map(len, prompts)), sum(map(len, result.tokens))
    parts = [
        f"{prompt:,} prompt tokens in {timing.prefill_s:.2f} s",
        f"{new:,} new in {timing.decode_s:.2f} s ({timing.tokens_per_s:.1f} tokens/s)",
        f"{attention.mode} attention, {attention.retrieval_heads} of {attention.kv_heads} KV heads retrieve, "
        f"{attention.kv_read_share:.0%} of the cache read",
    ]
    return " · ".join(parts)
