"""A conversation as ids for a model: turns, what still fits, replies that carry the state on.

Law:   a reply equals what the full forward pass over the whole conversation would give; the state
       of the last reply is used where the new prompt begins with the ids that it has read.
Rule:  when the context is full the oldest turns go, said once; a reply has its room before they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lib.cli.console import note
from lib.data.vocab import chat
from lib.export.generate import Carried, Generation, Sampling, TextStream, encode_prompt
from lib.export.saved import Opened


@dataclass
class Turn:
    """One message and the ids that stand for it."""

    role: str
    content: str
    ids: list[int]


@dataclass
class Conversation:
    """The turns so far, as ids for the model."""

    opened: Opened
    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str]
    chat: bool  # whether turns are framed by the template's ids
    turns: list[Turn] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # notes that were said
    carried: Carried = ((), None)  # the model's state after the last turn
    device: Any = "cpu"
    pending: bytes = b""  # of a character that the last message has begun

    def add(self, role: str, content: str | bytes, ids: list[int] | None = None) -> None:
        """Append a message; ids: those that the model itself made, kept as they are.

        Bytes may end inside a character, which a reply without a frame between completes.
        """
        data = content if isinstance(content, bytes) else content.encode()
        if ids is None:
            lead = b"\n" if role == "user" and self.turns and not self.chat else b""
            ids, pending = encode_prompt(self.opened.tokenizer, lead + data)
            self.pending = b"" if self.chat else pending
        if self.chat:
            specials = self.opened.tokenizer.specials
            name = "assistant" if role == "assistant" else "user"
            ids = [specials[f"<|{name}_start|>"], *ids, specials[f"<|{name}_end|>"]]
        self.turns.append(Turn(role, data.decode(errors="replace"), ids))

    def prompt(self) -> list[int]:
        """All turns as ids, the oldest left out where they and the reply pass the context."""
        opening = [self.opened.tokenizer.specials[chat.IDS[2]]] if self.chat else []
        start, context = self.opened.start_ids, self.opened.model.max_context
        turns = [turn.ids for turn in self.turns]
        if context is not None and turns:
            reply = max(1, min(self.max_new_tokens, context // 2))
            turns = self._newest(turns, max(2, context - reply - len(start) - len(opening)))
        return [*start, *chain.from_iterable(turns), *opening]

    def _newest(self, turns: list[list[int]], room: int) -> list[list[int]]:
        """The last turns that fit, at least one: its end where it is too long by itself."""
        last, frame = turns[-1], turns[-1][: 1 if self.chat else 0]
        if len(last) > room:
            self._tell("the message is longer than the context, its start is left out")
            turns = [*turns[:-1], frame + last[len(frame) - room :]]
        first = len(turns) - 1
        while first and sum(map(len, turns[first - 1 :])) <= room:
            first -= 1
        if first:
            self._tell("the context is full, the oldest turns are left out")
        return turns[first:]

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            note(f"note: {text}")

    def reply(self) -> Iterator[str]:
        """The reply as it grows; it is appended at its end, also when Ctrl-C ends it."""
        from lib.export.hf import stop_ids

        ids = self.prompt()
        room = self.opened.model.max_context
        new = self.max_new_tokens if room is None else min(self.max_new_tokens, room - len(ids))
        stream = TextStream(self.opened.tokenizer.decode_bytes, self.stop, self.pending)
        generation = Generation(
            self.opened.model, ids or self.opened.start_ids, self.sampling,
            max_new_tokens=max(1, new), stop_ids=stop_ids(self.opened.tokenizer),
            device=self.device,
            carried=self.carried,
        )  # fmt: skip
        said = ""
        try:
            for made in generation:
                if made[0] is not None:
                    said += (text := stream.feed(made[0]))
                    yield text
                if stream.stopped:
                    break
            said += (text := stream.finish())
            yield text
        except KeyboardInterrupt:
            generation.rows[0].stop = "interrupted"
            note("interrupted; go on, or Ctrl-C again to leave")
        finally:
            self.carried = generation.carried
            # Encoded again they might be other ids for the same text, and the state would be lost.
            self.add("assistant", said, None if stream.stopped else generation.rows[0].ids)
