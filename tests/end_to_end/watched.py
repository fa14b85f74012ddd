"""The ClientApp of this repository, with a note of each message that it answers.

A note is a line of ``watched.jsonl`` in the client's state folder: the process, the kind of message, what its answer
says beside tensors, and how many bytes the client's context keeps once it has been answered.
"""

import json
import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from typing_extensions import override

from clients.app import app as inner
from fedpeft.flower.packing import glance


class Watched(ClientApp):
    """Answers as the app does that it is wrapped around."""

    @override
    def __call__(self, message: Message, context: Context) -> Message:
        reply = inner(message, context)
        kind, facts = glance(reply.content)
        records = [x for x in context.state.values() if isinstance(x, ConfigRecord)]
        note = {
            "process": os.getpid(),
            "asked": message.metadata.message_type,
            "answer": kind,
            "facts": facts,
            "kept": sum(len(x) for record in records for x in record.values() if isinstance(x, bytes)),
        }
        with (Path(str(context.node_config["state"])) / "watched.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return reply


app = Watched()
