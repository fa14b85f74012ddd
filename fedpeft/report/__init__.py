"""What a run leaves behind: its folder, checkpoints and records, a report to read, and runs compared."""

from fedpeft.report.checkpoint import Checkpoint, Checkpoints, settled
from fedpeft.report.compare import Comparison, compare
from fedpeft.report.devices import DeviceRecord, MemoryRecord
from fedpeft.report.folder import FLEET, RunFolder
from fedpeft.report.history import History, history
from fedpeft.report.inexact import inexact
from fedpeft.report.memory import exceeded
from fedpeft.report.page import write_report
from fedpeft.report.people import ClientData
from fedpeft.report.records import BaselineRecord, FinalRecord, RoundRecord, RunRecord, Score, Scores
from fedpeft.report.sessions import PhaseRecord, SecureRecord, label_json, write_privacy
from fedpeft.report.side_by_side import arrival_table, table, write_comparison
from fedpeft.report.strict import Json

__all__ = [
    "FLEET",
    "BaselineRecord",
    "Checkpoint",
    "Checkpoints",
    "ClientData",
    "Comparison",
    "DeviceRecord",
    "FinalRecord",
    "History",
    "Json",
    "MemoryRecord",
    "PhaseRecord",
    "RoundRecord",
    "RunFolder",
    "RunRecord",
    "Score",
    "Scores",
    "SecureRecord",
    "arrival_table",
    "compare",
    "exceeded",
    "history",
    "inexact",
    "label_json",
    "settled",
    "table",
    "write_comparison",
    "write_privacy",
    "write_report",
]
