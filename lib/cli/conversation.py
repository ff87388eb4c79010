"""A conversation as ids for a model: turns, what still fits, replies that carry the state on.

Law:   a reply equals what the full forward pass over the whole conversation would give; the state
       of the last reply is used where the new prompt begins with the ids that it has read.
Rule:  when the context is full the oldest turns go, said once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.cli.console import note
from lib.data.vocab import chat
from lib.export.generate import Carried, Generation, Sampling, TextStream
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
    dropped: bool = False
    carried: Carried = ((), None)  # the model's state after the last turn
    device: Any = "cpu"

    def add(self, role: str, content: str, ids: list[int] | None = None) -> None:
        """Append a message; ids: those that the model itself made, kept as they are."""
        text = "\n" + content if role == "user" and self.turns and not self.chat else content
        if ids is None:
            ids = [int(i) for i in self.opened.tokenizer.encode(text)] if text else []
        if self.chat:
            specials = self.opened.tokenizer.specials
            name = "assistant" if role == "assistant" else "user"
            ids = [specials[f"<|{name}_start|>"], *ids, specials[f"<|{name}_end|>"]]
        self.turns.append(Turn(role, content, ids))

    def prompt(self) -> list[int]:
        """All turns as ids, the oldest left out where the context is full."""
        opening = [self.opened.tokenizer.specials[chat.IDS[2]]] if self.chat else []
        room = self.opened.model.max_context
        start = self.opened.start_ids
        fixed = len(start) + len(opening) + 1
        kept: list[int] = []
        for turn in reversed(self.turns):
            if room is not None and fixed + len(kept) + len(turn.ids) > room:
                break
            kept = turn.ids + kept
        else:
            return start + kept + opening
        if not kept and room is not None:  # one message longer than the context: its end stays
            kept = self.turns[-1].ids[fixed - room :]
        if not self.dropped:
            note("note: the context is full, the oldest turns are left out")
            self.dropped = True
        return start + kept + opening

    def reply(self) -> Iterator[str]:
        """The reply as it grows; it is appended at its end, also when Ctrl-C ends it."""
        from lib.export.hf import stop_ids

        ids = self.prompt()
        room = self.opened.model.max_context
        new = self.max_new_tokens if room is None else min(self.max_new_tokens, room - len(ids))
        stream = TextStream(self.opened.tokenizer.decode_bytes, self.stop)
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
