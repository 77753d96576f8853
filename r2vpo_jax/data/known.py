"""Data sets by name: the columns of public copies, as their cards state them. docs/data.md says where files go."""

import dataclasses

from r2vpo_jax.data.fields import Columns

_ANSWER = (("answer", "verbatim"),)

# Copies in the format of DAPO-Math-17k: chat messages, with an instruction around each problem. Ours comes instead of it.
_CHAT_QUESTION = ("prompt.user.content", "prompt")
_CHAT_ANSWER = (("reward_model.ground_truth", "verbatim"),)
_WRAPPED = {
    "wrapper": r"Solve the following math problem step by step\..*?is the answer to the problem\.\s+"
    r"(.*?)\s+Remember to put your answer on its own line after \"Answer:\"\.?",
    "wrapper_mark": "Solve the following math problem step by step.",
}


@dataclasses.dataclass(frozen=True)
class KnownDataset:
    """A data set with a name, and how to read the public copy."""

    name: str
    published: str  # where the public copy is
    columns: Columns
    where: tuple[tuple[str, str], ...] = ()  # (column, value): other rows are left out, where there is such a column
    missing: str = "error"  # rows without question or answer: error, or drop and count
    conflicts: str = "error"  # one question with different answers: error, or drop all and count
    one_split: bool = False  # published as one split, whatever its name
    tfds: bool = False  # also a prepared tensorflow_datasets data set
    shipped: bool = False  # with this package


KNOWN = {
    row.name: row
    for row in (
        KnownDataset(
            "gsm8k",
            "openai/gsm8k (config main); github.com/openai/grade-school-math; tensorflow_datasets",
            Columns(("question",), (("answer", "hash"),), kind="numeric"),
            tfds=True,
        ),
        KnownDataset(
            "word_problems",
            "shipped with r2vpo_jax: invented problems in the format of GSM8K",
            Columns(("question",), (("answer", "hash"),), kind="numeric"),
            shipped=True,
        ),
        KnownDataset("math", "EleutherAI/hendrycks_math", Columns(("problem",), (("solution", "boxed"),), ("level",))),
        KnownDataset(
            "math500",
            "HuggingFaceH4/MATH-500",
            Columns(("problem",), (*_ANSWER, ("solution", "boxed")), ("level",)),
            one_split=True,
        ),
        KnownDataset(
            "dapo_math_17k",
            "BytedTsinghua-SIA/DAPO-Math-17k",
            Columns(
                _CHAT_QUESTION,
                (*_CHAT_ANSWER, ("solution", "verbatim")),
                **_WRAPPED,
            ),
            conflicts="drop",
            one_split=True,
        ),
        KnownDataset(
            "deepscaler",
            "agentica-org/DeepScaleR-Preview-Dataset",
            Columns(("problem",), _ANSWER),
            missing="drop",
            conflicts="drop",
            one_split=True,
        ),
        KnownDataset(
            "aime24",
            "HuggingFaceH4/aime_2024 or math-ai/aime24",
            Columns(
                ("problem", "question", *_CHAT_QUESTION), (*_ANSWER, *_CHAT_ANSWER, ("solution", "boxed")), **_WRAPPED
            ),
            one_split=True,
        ),
        KnownDataset(
            "aime25",
            "math-ai/aime25",
            Columns(("problem", "question", *_CHAT_QUESTION), (*_ANSWER, *_CHAT_ANSWER), **_WRAPPED),
            one_split=True,
        ),
        KnownDataset("amc23", "math-ai/amc23", Columns(("question", "problem"), _ANSWER), one_split=True),
        KnownDataset(
            "minerva",
            "math-ai/minervamath",
            Columns(("question", "problem"), (*_ANSWER, ("solution", "boxed"))),
            one_split=True,
        ),
        KnownDataset(
            "olympiadbench",
            "Hothan/OlympiadBench (config OE_TO_maths_en_COMP)",
            Columns(
                ("question", "problem"),
                (("final_answer", "list"), ("answer", "list")),
                ("subfield", "difficulty"),
                ("context",),
            ),
            where=(
                ("modality", "Text-only"),
                ("language", "English"),
                ("subject", "Math"),
                ("question_type", "Open-ended"),
            ),
            one_split=True,
        ),
    )
}

# Earlier name -> name.
RENAMED = {"gsm8k_fixture": "word_problems"}

# A file of any other name.
LOCAL_FILE = KnownDataset(
    "file",
    "",
    Columns(
        ("question", "problem", *_CHAT_QUESTION),
        (*_ANSWER, *_CHAT_ANSWER, ("final_answer", "list")),
        ("level",),
        **_WRAPPED,
    ),
)
