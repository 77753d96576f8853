"""Data sets by name: the columns of public copies, as their cards state them. docs/data.md says where files go."""

import dataclasses

from r2vpo_jax.data.fields import Mapping

_ANSWER = (("answer", "verbatim"),)

# Copies in the format of DAPO-Math-17k: chat messages, with an instruction around each problem. Ours comes instead of it.
_CHAT_QUESTION = ("prompt.0.content", "prompt")
_CHAT_ANSWER = (("reward_model.ground_truth", "verbatim"),)
_WRAPPED = {
    "wrapper": r"Solve the following math problem step by step\..*?is the answer to the problem\.\s+"
    r"(.*?)\s+Remember to put your answer on its own line after \"Answer:\"\.?",
    "wrapper_mark": "Solve the following math problem step by step.",
}


@dataclasses.dataclass(frozen=True)
class Named:
    """One named data set."""

    name: str
    published: str  # where the public copy is
    fields: Mapping
    where: tuple[tuple[str, str], ...] = ()  # (column, value): other rows are left out, where there is such a column
    missing: str = "error"  # rows without question or answer: error, or drop and count
    conflicts: str = "error"  # one question with different answers: error, or drop all and count
    one_split: bool = False  # published as one split, whatever its name
    tfds: bool = False  # also a prepared tensorflow_datasets data set
    shipped: bool = False  # with this package


TABLE = {
    row.name: row
    for row in (
        Named(
            "gsm8k",
            "openai/gsm8k (config main); github.com/openai/grade-school-math; tensorflow_datasets",
            Mapping(("question",), (("answer", "hash"),), kind="numeric"),
            tfds=True,
        ),
        Named(
            "gsm8k_fixture",
            "shipped with r2vpo_jax: invented problems in the format of GSM8K",
            Mapping(("question",), (("answer", "hash"),), kind="numeric"),
            shipped=True,
        ),
        Named("math", "EleutherAI/hendrycks_math", Mapping(("problem",), (("solution", "boxed"),), ("level",))),
        Named(
            "math500",
            "HuggingFaceH4/MATH-500",
            Mapping(("problem",), (*_ANSWER, ("solution", "boxed")), ("level",)),
            one_split=True,
        ),
        Named(
            "dapo_math_17k",
            "BytedTsinghua-SIA/DAPO-Math-17k",
            Mapping(
                _CHAT_QUESTION,
                (*_CHAT_ANSWER, ("solution", "verbatim")),
                **_WRAPPED,
            ),
            conflicts="drop",
            one_split=True,
        ),
        Named(
            "deepscaler",
            "agentica-org/DeepScaleR-Preview-Dataset",
            Mapping(("problem",), _ANSWER),
            missing="drop",
            conflicts="drop",
            one_split=True,
        ),
        Named(
            "aime24",
            "HuggingFaceH4/aime_2024 or math-ai/aime24",
            Mapping(
                ("problem", "question", *_CHAT_QUESTION), (*_ANSWER, *_CHAT_ANSWER, ("solution", "boxed")), **_WRAPPED
            ),
            one_split=True,
        ),
        Named(
            "aime25",
            "math-ai/aime25",
            Mapping(("problem", "question", *_CHAT_QUESTION), (*_ANSWER, *_CHAT_ANSWER), **_WRAPPED),
            one_split=True,
        ),
        Named("amc23", "math-ai/amc23", Mapping(("question", "problem"), _ANSWER), one_split=True),
        Named(
            "minerva",
            "math-ai/minervamath",
            Mapping(("question", "problem"), (*_ANSWER, ("solution", "boxed"))),
            one_split=True,
        ),
        Named(
            "olympiadbench",
            "Hothan/OlympiadBench (config OE_TO_maths_en_COMP)",
            Mapping(
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

# Files of any other name.
FILE = Named(
    "file",
    "",
    Mapping(
        ("question", "problem", *_CHAT_QUESTION),
        (*_ANSWER, *_CHAT_ANSWER, ("final_answer", "list")),
        ("level",),
        **_WRAPPED,
    ),
)
