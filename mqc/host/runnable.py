"""A loaded artifact: what ``mqc.load`` returns, the same class for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mqc.artifact import MODEL_FOLDER, check_files
from mqc.errors import UsageError
from mqc.host.engine import Engine
from mqc.host.generate import (
    GenerationResult,
    Sampling,
    TextStream,
    Token,
    generate_batch,
    steps,
    stop_tokens,
)
from mqc.host.prompt import Messages, Prompt, PromptAdapter, build_prompt, messages_from
from mqc.host.score import EvalItem, answer_ids


class Runnable:
    """An engine with the model's processor: chat messages in, text out.

    Attributes:
        engine: the target's engine.
        processor: the model's processor (:func:`mqc.capture.load_processor`).
        adapter: the model family's adapter.
        manifest: the artifact's manifest, empty for a program that was never saved.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Any,
        adapter: PromptAdapter,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.processor = processor
        self.adapter = adapter
        self.manifest = dict(manifest or {})

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def stop(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return stop_tokens(self.engine.facts, self.tokenizer)

    def prompt(
        self,
        messages: Messages | None = None,
        *,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
    ) -> Prompt:
        """Chat messages, or a text with pictures and videos before it, as a :class:`Prompt`.

        A video is a path, a list of frames, or a message part that names its ``fps`` too
        (:func:`mqc.host.videos.open_video`).

        Raises :class:`UsageError` unless exactly one of ``messages`` and ``prompt`` is given.
        """
        if (messages is None) == (prompt is None):
            raise UsageError("give either messages or prompt", hint='generate(prompt="...")')
        for what, given in (("images", images), ("videos", videos)):
            if messages is not None and given:
                raise UsageError(
                    f"{what} go into the messages", hint=f"or use prompt=... with {what}="
                )
        if messages is None:
            messages = messages_from(prompt or "", _as_list(images), _as_list(videos))
        return build_prompt(messages, self.processor, self.adapter)

    def generate(
        self,
        messages: Messages | None = None,
        *,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        chunk: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Answer one conversation; ``on_text`` gets the text as it is written."""
        stream, stops = TextStream(self.tokenizer), frozenset(self.stop)

        def on_token(token: Token) -> None:
            _emit(on_text, "" if token.id in stops else stream.put(token.id))

        result = generate_batch(
            self.engine,
            [self.prompt(messages, prompt=prompt, images=images, videos=videos)],
            tokenizer=self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stops,
            sampling=sampling,
            chunk=chunk,
            on_token=on_token,
        )[0]
        _emit(on_text, stream.end())
        return result

    def stream(
        self,
        messages: Messages | None = None,
        *,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        chunk: int | None = None,
    ) -> Iterator[str]:
        """Answer one conversation, yielding pieces of text as they are written.

        The prompt is built at the call, so its errors come before the first piece.
        """
        built = self.prompt(messages, prompt=prompt, images=images, videos=videos)
        stops, text = frozenset(self.stop), TextStream(self.tokenizer)
        tokens = steps(
            self.engine,
            [built],
            max_new_tokens=max_new_tokens,
            stop=stops,
            sampling=sampling,
            chunk=chunk,
        )
        return _pieces((token.id for token in tokens if token.id not in stops), text)

    def generate_batch(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        chunk: int | None = None,
    ) -> list[GenerationResult]:
        """Answer several conversations in one batch."""
        return generate_batch(
            self.engine,
            [self.prompt(messages) for messages in conversations],
            tokenizer=self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=self.stop,
            sampling=sampling,
            chunk=chunk,
        )

    def eval_item(self, messages: Messages, answer: str) -> EvalItem:
        """A conversation and its right answer, for :func:`mqc.host.evaluate`."""
        return EvalItem(
            self.prompt(messages), answer_ids(answer, self.tokenizer, self.engine.facts)
        )


def load_runnable(
    path: str | Path,
    make_engine: Callable[[Path, Mapping[str, Any]], Engine],
    *,
    check: bool = True,
    trust_remote_code: bool = False,
) -> Runnable:
    """Open an artifact: check its files, load the processor, make the engine.

    ``make_engine(folder, manifest)`` opens the target's own files. ``check`` False skips the
    files' hashes (their sizes are still compared); ``trust_remote_code`` runs the code that the
    checkpoint brought.
    """
    from mqc.capture import adapter_for, load_processor

    folder = Path(path)
    manifest = check_files(folder, hashes=check)
    model = folder / MODEL_FOLDER
    adapter = adapter_for(model, trust_remote_code)
    processor = load_processor(model, trust_remote_code)
    return Runnable(make_engine(folder, manifest), processor, adapter, manifest)


def _pieces(tokens: Iterator[int], text: TextStream) -> Iterator[str]:
    for token in tokens:
        if piece := text.put(token):
            yield piece
    if piece := text.end():
        yield piece


def _emit(on_text: Callable[[str], None] | None, piece: str) -> None:
    if on_text is not None and piece:
        on_text(piece)


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]
