"""lm-evaluation-harness on a model of ours: its tasks and metrics, our engine, dense and hybrid on the same questions.

The package `lm_eval` comes with the extra `eval`. This module registers the model class "lychee" there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.evaluation.harness_answers import Answer, Answers, Question
from lychee_jax.evaluation.runner import tokenizer_of
from lychee_jax.evaluation.session import answer_settings
from lychee_jax.evaluation.variants import Variant
from lychee_jax.files import json_text
from lychee_jax.llm import LLM
from lychee_jax.loading import load
from lychee_jax.run_folder import Record, append_lines, write_json
from lychee_jax.text.chat import ChatOptions, Message
from lychee_jax.text.streaming import TextStream

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported ({error}); install it with: pip install 'lychee-jax[eval]'"
    ) from error

RESULTS, SAMPLES = "results.json", "samples.jsonl"
MAX_NEW_TOKENS = 256
"""Of an answer whose task sets no limit, as with lm-eval's own models."""

type Scored = tuple[tuple[str, str], list[int], list[int]]
"""A context and its continuation as texts, and the tokens of both."""


class LycheeLM(TemplateLM):
    """A model of ours as lm-eval asks models.

    Every question is put to the engine. A continuation that is scored is forced tokens, decoded one by one, so that
    sparse heads matter for all of them but the first; `decode_last` lets them matter for the end of the prompt, too.

    Besides `LycheeLM(model, options)`, lm-eval makes one by itself once this module is imported:
    `lm_eval.simple_evaluate("lychee", {"path": "my-8b", "attention": "hybrid", "budget": 1024}, tasks=[…])`, with the
    keywords of `lychee_jax.load` and of `LLM.generate`.
    """

    def __init__(
        self,
        model: LLM,
        options: GenerateOptions,
        variant: Variant | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        turns: Sequence[Message] = (),
        decode_last: int = 0,
        batch: int = 16,
        answers: Answers | None = None,
        on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: that answers.
            options: heads, policy, page size, ends of text.
            variant: attention and budget, instead of those of the options. A budget that is a share counts from the
                largest power of two that the prompt's length holds, as every budget is a program of its own.
            template_kwargs: keywords for the chat template.
            turns: messages that stand before every question that is a conversation, behind its system message.
            decode_last: so many last tokens of every prompt are fed one by one through the decode path.
            batch: questions at a time; it changes no answer.
            answers: where answers are kept and looked up.
            on_progress: called with what is asked, how many answers have come, and how many questions there are.

        Raises:
            UserError: a number out of its range, or a model without a tokenizer.
        """
        super().__init__()
        if batch < 1 or decode_last < 0:
            raise UserError(f"batch is {batch} and decode-last {decode_last}; they must be at least 1 and 0")
        self._model, self._text, self._options, self._variant = model, tokenizer_of(model), options, variant
        self._template_kwargs, self._decode_last, self._batch = dict(template_kwargs or {}), decode_last, batch
        self._turns = list(turns)
        self._answers, self._on_progress = answers or Answers(), on_progress
        self.label = options.attention if variant is None else variant.label
        self.pages_read = self.pages_held = 0

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> LycheeLM:
        """What lm-eval makes of the name "lychee"; its own batch size and device are left to the engine."""
        keywords = dict(arg_dict)
        model = load(keywords.pop("path", None), keywords.pop("dtype", None))
        return cls(model, model.options(**keywords))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LycheeLM:
        """The same for `path=my-8b,attention=hybrid`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What lm-eval asks about text.

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end a text."""
        return next(iter(self._model.eos_ids), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored after: the token that begins texts, or else one that ends them.

        Raises:
            UserError: the model has neither.
        """
        for token in (self._text.bos_id, *self._model.eos_ids):
            if token is not None:
                return token
        raise UserError(
            f"{self._model.path} has no token that begins or ends a text, after which texts could be scored"
        )

    @property
    def max_length(self) -> int:
        """Tokens that may stand before the last one: it is scored and never read, but has a place in the cache."""
        return self._model.config.max_tokens - 1

    @property
    def tokenizer_name(self) -> str:
        """The model's folder."""
        return str(self._model.path.resolve())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with what belongs in front of a text unless it is there already, and nothing behind it."""
        front = self._text.prefix_ids
        if add_special_tokens is None and front and string.startswith(self._text.token_text(front[0])):
            front = []
        return [*(front if add_special_tokens is not False else []), *self._text.encode_plain(string)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The checkpoint's template, for lm-eval's records."""
        found = self._text.chat_template
        return found if isinstance(found, str) else json_text(found or "")

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt, its last message is the beginning of the answer."""
        system = [message for message in chat_history[:1] if message["role"] == "system"]
        chat_history = [*system, *self._turns, *chat_history[len(system) :]]
        if add_generation_prompt:
            return self._text.render_messages(chat_history, self._template_kwargs)
        *before, last = chat_history
        return self._text.render_messages(before, self._template_kwargs, answer=last["content"])

    # The three kinds of requests.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of every continuation after its context, and whether greedy decoding would say it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        questions = [self._scoring(context, continuation) for _, context, continuation in requests]
        answers = self._ask("log-likelihoods", questions)
        return [(answer.logprob, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of every text, each of its tokens scored once, in windows of the model's limit.

        The text's own tokens are scored after `prefix_token_id`: a BOS that the tokenizer adds is not scored itself.
        """
        windows = []
        for request in requests:
            (text,) = request.args
            rolled = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, context_len=1
            )
            windows.append([self._scoring(*make_disjoint_window(window)) for window in rolled])
        answers = iter(self._ask("perplexity", [question for each in windows for question in each]))
        return [math.fsum(next(answers).logprob for _ in each) for each in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that follows every context, cut before the first stop text."""
        asked: dict[Question, int] = {}
        questions = []
        for request in requests:
            question = self._generation(*request.args)
            repeat = asked[question] = asked.get(question, -1) + 1
            if question.sampling.temperature:  # drawn anew each time
                sampling = dataclasses.replace(question.sampling, seed=question.sampling.seed + repeat)
                question = dataclasses.replace(question, sampling=sampling)
            questions.append(question)
        return [answer.text for answer in self._ask("answers", questions)]

    def _scoring(self, context: Sequence[int], continuation: Sequence[int]) -> Question:
        room = self._model.config.max_tokens - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens with one before it exceeds the model's limit of "
                f"{self._model.config.max_tokens}"
            )
        prompt = tuple(context)[-room:] or (self.prefix_token_id,)
        return Question(prompt, tuple(continuation), len(continuation))

    def _generation(self, context: str, gen_kwargs: Mapping[str, Any]) -> Question:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_NEW_TOKENS))
        until, limit = wanted.pop("until"), wanted.pop("max_gen_toks")
        samples, beams = wanted.pop("do_sample"), wanted.pop("num_beams", 1)
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        if unknown := [*(name for name in wanted if name not in known), *(["num_beams"] if beams != 1 else [])]:
            raise UserError(f"a task asks for generation with {unknown[0]}, which is not supported")
        temperature = wanted.pop("temperature", 1.0)
        room = self._model.config.max_tokens - limit
        if room < 1:
            raise UserError(f"a task asks for {limit} new tokens; the model's limit is {self._model.config.max_tokens}")
        prompt = tuple(self.tok_encode(context)[-room:]) or (self.prefix_token_id,)
        stops = tuple(dict.fromkeys(stop for stop in until if stop))
        return Question(prompt, (), limit, stops, SamplingParams(temperature=temperature if samples else 0.0, **wanted))

    # The engine.

    def _ask(self, stage: str, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; what is there already is not asked again, nor is one question twice."""
        groups: dict[GenerateOptions, list[Question]] = {}
        for question in dict.fromkeys(questions):
            if not question.forced and not question.limit:  # an empty continuation is certain
                self._answers.add(self.label, [(question, Answer("", 0.0, True, 0, 0))])
            elif not self._answers.has(self.label, question):
                groups.setdefault(self._options_for(question), []).append(question)
        done, total = 0, sum(map(len, groups.values()))
        for options, group in groups.items():
            # What is drawn depends on a row's place among those that are asked together.
            size = 1 if options.sampling.temperature else self._batch
            for first in range(0, len(group), size):
                part = group[first : first + size]
                self._answers.add(self.label, zip(part, self._answer(part, options), strict=True))
                done += len(part)
                self._on_progress(f"{self.label}: {stage}", done, total)
        found = [self._answers.get(self.label, question) for question in questions]
        self.pages_read += sum(answer.pages_read for answer in found)
        self.pages_held += sum(answer.pages_held for answer in found)
        return found

    def _options_for(self, question: Question) -> GenerateOptions:
        options = dataclasses.replace(self._options, sampling=question.sampling, max_new_tokens=1)
        if self._variant is None:
            return options
        return self._variant.options(options, 1 << (len(question.prompt).bit_length() - 1), 1)

    def _answer(self, questions: Sequence[Question], options: GenerateOptions) -> list[Answer]:
        held = [min(self._decode_last, len(question.prompt) - 1) for question in questions]
        cuts = [len(question.prompt) - count for question, count in zip(questions, held, strict=True)]
        stream = self._model.stream_tokens(
            [question.prompt[:cut] for question, cut in zip(questions, cuts, strict=True)],
            options,
            forced=[(*question.prompt[cut:], *question.forced) for question, cut in zip(questions, cuts, strict=True)],
            limits=[count + question.limit for question, count in zip(questions, held, strict=True)],
        )
        texts = [TextStream(self._text, question.stops, options.eos_ids) for question in questions]
        seen = [-count for count in held]
        for row, output in stream:
            for count, token in enumerate(output.tokens, 1):
                seen[row] += 1
                if seen[row] > 0 and not questions[row].forced:
                    texts[row].push(token)
                if texts[row].stopped:
                    stream.finish(row, unused=len(output.tokens) - count)
                    break
        result = stream.result()
        answers = []
        for row, (question, text) in enumerate(zip(questions, texts, strict=True)):
            text.finish()
            scored = slice(held[row], held[row] + len(question.forced))
            answers.append(
                Answer(
                    text.text, math.fsum(result.logprobs[row][scored]), all(result.greedy[row][scored]),
                    result.pages_read[row], result.pages_held[row],
                )
            )  # fmt: skip
        return answers


register_model("lychee")(LycheeLM)


@dataclasses.dataclass(frozen=True)
class HarnessReport:
    """What came out: `results[variant][task]` has lm-eval's metrics under its names, such as "acc,none"."""

    about: Record
    results: dict[str, dict[str, Record]]
    kv_read_share: dict[str, float]

    def to_json(self) -> Record:
        """As plain data."""
        return dataclasses.asdict(self)

    def markdown(self) -> str:
        """A table with a column for each variant."""
        variants = list(self.results)
        rows = {
            (task, metric): None
            for found in self.results.values()
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if isinstance(value, float | int) and "," in metric and "_stderr," not in metric
        }
        lines = [f"| task | metric | {' | '.join(variants)} |", f"| --- | --- |{' --- |' * len(variants)}"]
        for task, metric in rows:
            name = metric.removesuffix(",none").replace(",", ", ")
            cells = [_cell(self.results[variant].get(task, {}), metric) for variant in variants]
            lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
        lines.append(f"| | cache read | {' | '.join(f'{self.kv_read_share[variant]:.1%}' for variant in variants)} |")
        return "\n".join(lines)


def evaluate(
    model: LLM,
    tasks: Sequence[str],
    variants: Sequence[Variant],
    options: GenerateOptions,
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: ChatOptions | None = None,
    decode_last: int = 0,
    batch: int = 16,
    output: Path | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> HarnessReport:
    """Run tasks of lm-evaluation-harness with every variant.

    Args:
        model: that answers.
        tasks: names of tasks, groups or tags, patterns such as `mmlu_*`, or YAML files.
        variants: attention and budget.
        options: heads, policy, page size, ends of text.
        include: a folder with tasks besides those that lm-eval brings along.
        limit: questions of each task; None: all.
        num_fewshot: examples in front of every question; None: as the task says.
        chat: questions become conversations, with its messages before them.
        decode_last: so many last tokens of every prompt are fed one by one through the decode path.
        batch: questions at a time; it changes no answer.
        output: a folder for settings, answers, lm-eval's samples and the results; a run that is there is resumed, and
            its tasks, limits and variants may grow.
        on_progress: called with what is asked, how many answers have come, and how many questions there are.

    Raises:
        UserError: an unknown task, one that cannot be loaded or asks for what is not supported, or a folder that holds
            another run.
    """
    for name, value, least in (("limit", limit, 1), ("num-fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    manager = _Tasks.of(tasks, include)
    names: list[Any] = manager.names(tasks)
    # Questions are known by their tokens, so that neither tasks nor chat templates need to be the same.
    settings = {"benchmark": "lm-eval", **answer_settings(model, options), "decode_last": decode_last}
    answers = Answers(output, settings)
    before = [] if chat is None else list(chat.before)
    # lm-eval joins a system message with a task's own description.
    system = next((message["content"] for message in before if message["role"] == "system"), None)
    turns = [message for message in before if message["role"] != "system"]
    results: dict[str, dict[str, Record]] = {}
    shares: dict[str, float] = {}
    samples: list[Record] = []
    for variant in variants:
        judged = LycheeLM(
            model, options, variant, template_kwargs=chat.template_kwargs if chat else None, turns=turns,
            decode_last=decode_last, batch=batch, answers=answers, on_progress=on_progress,
        )  # fmt: skip
        try:
            found = simple_evaluate(
                judged, tasks=names, task_manager=manager, limit=limit, num_fewshot=num_fewshot,
                apply_chat_template=chat is not None, system_instruction=system, log_samples=output is not None,
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise UserError(f"a task's template is wrong: {error}") from error
        assert found is not None  # only the other processes of a distributed run get nothing
        results[variant.label] = _plain(found.get("results"))
        shares[variant.label] = judged.pages_read / judged.pages_held if judged.pages_held else 1.0
        for task, each in (found.get("samples") or {}).items():
            samples += [{"variant": variant.label, "task": task, **_plain(sample)} for sample in each]
    about = {
        "lm_eval": lm_eval.__version__, "model": model.name, "tasks": names, "limit": limit,
        "num_fewshot": num_fewshot, **({} if chat is None else chat.to_json()),
    }  # fmt: skip
    report = HarnessReport({**settings, **about}, results, shares)
    if output is not None:
        (output / SAMPLES).unlink(missing_ok=True)
        append_lines(output / SAMPLES, samples)
        write_json(output / RESULTS, report.to_json())
    return report


class _Tasks(TaskManager):
    """lm-eval's tasks, with failures told in a line."""

    @classmethod
    def of(cls, tasks: Sequence[str], include: Path | None) -> _Tasks:
        """The tasks of a folder alone if they are all that is asked for: indexing lm-eval's thousands takes seconds."""
        if include is None:
            return cls()
        if not include.is_dir():
            raise UserError(f"--include {include} is no folder")
        own = cls(include_path=str(include), include_defaults=False)
        alone = not own.all_groups and all(own.match_tasks([task]) for task in tasks)
        return own if alone else cls(include_path=str(include))

    def names(self, tasks: Sequence[str]) -> list[str]:
        """The tasks with patterns written out, each once."""
        found: dict[str, None] = {}
        for task in tasks:
            matched = [task] if Path(task).is_file() else self.match_tasks([task])
            if not matched:
                raise UserError(
                    f"task {task!r} is unknown to lm-evaluation-harness; give tasks of your own with --include"
                )
            found |= dict.fromkeys(matched)
        return list(found)

    def load(self, task_list: Any) -> Any:
        """Load tasks with their data.

        Raises:
            UserError: data or code that cannot be loaded, or a task that runs code or looks at pictures.
        """
        try:
            loaded = super().load(task_list)
        except Exception as error:  # data sets, templates and Python files of tasks fail in their own ways
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise UserError(f"the tasks cannot be loaded: {type(error).__name__}: {reason}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"task {name!r} runs code that the model writes, or shows it more than text: not supported"
                )
        return loaded


def _cell(metrics: Mapping[str, Any], metric: str) -> str:
    value = metrics.get(metric)
    if value is None:
        return ""
    spread = metrics.get(metric.replace(",", "_stderr,", 1))
    return f"{value:.4f}" + (f" ± {spread:.4f}" if isinstance(spread, float) else "")


def _plain(value: Any) -> Any:
    """As JSON has it: arrays become lists, numbers that are not finite null, and anything else its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
