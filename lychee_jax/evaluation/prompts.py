"""The prompts of published benchmarks, in their own words: with other words, scores could not be compared.

RULER: github.com/NVIDIA/RULER (Apache-2.0; Hsieh et al., arXiv 2404.06654), scripts/data/synthetic/constants.py.
LongBench: github.com/THUDM/LongBench (MIT; Bai et al., arXiv 2308.14508), config/dataset2prompt.json. Misprints are
theirs.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Wording:
    """A prompt with named gaps, the beginning of the answer that follows it, and the longest answer in tokens."""

    body: str
    answer: str
    max_new_tokens: int


NEEDLE = "One of the special magic {values} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DOCUMENT = "Document {number}:\n{text}"

RULER = {
    "niah": Wording(
        "Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {values} afterwards.\n{context}\n"
        "What are all the special magic {values} for {query} mentioned in the provided text?",
        " The special magic {values} for {query} mentioned in the provided text are",
        128,
    ),
    # The same for one value of one key.
    "niah-one": Wording(
        "A special magic {value} is hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {value} afterwards.\n{context}\n"
        "What is the special magic {value} for {query} mentioned in the provided text?",
        " The special magic {value} for {query} mentioned in the provided text is",
        128,
    ),
    "vt": Wording(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
        "the value {query}, they are: ",
        30,
    ),
    "cwe": Wording(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "fwe": Wording(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
    "qa": Wording(
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n{context}\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nQuestion: {query}",
        " Answer:",
        32,
    ),
}

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_STORY = (
    "question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any "
    "explanation.\n\n"
)
_ARTICLE = (
    " as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)

LONGBENCH = {
    "narrativeqa": Wording(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        f"Story: {{context}}\n\nNow, answer the {_STORY}Question: {{input}}\n\nAnswer:",
        "",
        128,
    ),
    "qasper": Wording(
        f"You are given a scientific article and a question. Answer the question{_ARTICLE}Article: {{context}}\n\n"
        f" Answer the question based on the above article{_ARTICLE}Question: {{input}}\n\nAnswer:",
        "",
        128,
    ),
    "multifieldqa_en": Wording(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        "",
        64,
    ),
    "hotpotqa": Wording(_PASSAGES, "", 32),
    "2wikimqa": Wording(_PASSAGES, "", 32),
    "qmsum": Wording(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        "",
        512,
    ),
    "trec": Wording(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        "",
        64,
    ),
    "triviaqa": Wording(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        "",
        32,
    ),
    "passage_retrieval_en": Wording(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        "",
        32,
    ),
}
