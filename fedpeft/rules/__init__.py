"""What is averaged: one file a rule, or a family of rules that differ in a field."""

from fedpeft.adapters import Pool
from fedpeft.rules.base import Broadcast, ListRule, MeanRule, Rule, ServerState, Task
from fedpeft.rules.each import FactorList
from fedpeft.rules.factors import FactorMean
from fedpeft.rules.fedex import FedEx
from fedpeft.rules.fedkseed import FedKSeed
from fedpeft.rules.fedrot import FedRot
from fedpeft.rules.fedsb import FedSB
from fedpeft.rules.fedsvd import FedSVD
from fedpeft.rules.flexlora import FlexLoRA
from fedpeft.rules.flora import FLoRA
from fedpeft.rules.frozen import frozen
from fedpeft.rules.hetlora import HetLoRA
from fedpeft.rules.lora_a2 import LoRAA2
from fedpeft.rules.lora_fair import LoRAFair
from fedpeft.rules.median import Median
from fedpeft.rules.objective import PLAIN, Objective
from fedpeft.rules.personal import PersonalList, PersonalMean, personal
from fedpeft.rules.ravan import Ravan
from fedpeft.rules.robust import Krum, TrimmedMean
from fedpeft.rules.scaffold import Scaffold
from fedpeft.rules.server import Adagrad, Adam, Averaging, Momentum, ServerOptimiser, Yogi
from fedpeft.rules.subspace import Subspace
from fedpeft.rules.weighting import Examples, SquareRoot, Uniform, Weighting
from fedpeft.rules.zeropad import ZeroPad

__all__ = [
    "PLAIN",
    "Adagrad",
    "Adam",
    "Averaging",
    "Broadcast",
    "Examples",
    "FLoRA",
    "FactorList",
    "FactorMean",
    "FedEx",
    "FedKSeed",
    "FedRot",
    "FedSB",
    "FedSVD",
    "FlexLoRA",
    "HetLoRA",
    "Krum",
    "ListRule",
    "LoRAA2",
    "LoRAFair",
    "MeanRule",
    "Median",
    "Momentum",
    "Objective",
    "PersonalList",
    "PersonalMean",
    "Pool",
    "Ravan",
    "Rule",
    "Scaffold",
    "ServerOptimiser",
    "ServerState",
    "SquareRoot",
    "Subspace",
    "Task",
    "TrimmedMean",
    "Uniform",
    "Weighting",
    "Yogi",
    "ZeroPad",
    "frozen",
    "personal",
]
