"""The host: what runs around the graphs, the same for every target.

Prompts (chat messages and images to token ids), batches and attention masks, prefill and decode,
sampling, streaming text, scoring. A target brings an :class:`Engine`; everything else is here.
"""

from mqc.host.batch import Batch, KeyTable, make_batch
from mqc.host.engine import Cache, Engine, State, decode_step, merge, prefill, spread
from mqc.host.generate import GenerationResult, Sampling, Token, generate, generate_batch, steps
from mqc.host.program_engine import ProgramEngine
from mqc.host.prompt import Prompt, append_answer, build_prompt, build_prompts, messages_from
from mqc.host.runnable import Runnable, load_runnable
from mqc.host.score import (
    AnswerScore,
    EvalItem,
    EvalReport,
    answer_ids,
    evaluate,
    score,
    wilson,
)
from mqc.host.videos import Video, open_video

__all__ = [
    "AnswerScore",
    "Batch",
    "Cache",
    "Engine",
    "EvalItem",
    "EvalReport",
    "GenerationResult",
    "KeyTable",
    "ProgramEngine",
    "Prompt",
    "Runnable",
    "Sampling",
    "State",
    "Token",
    "Video",
    "answer_ids",
    "append_answer",
    "build_prompt",
    "build_prompts",
    "decode_step",
    "evaluate",
    "generate",
    "generate_batch",
    "load_runnable",
    "make_batch",
    "merge",
    "messages_from",
    "open_video",
    "prefill",
    "score",
    "spread",
    "steps",
    "wilson",
]
