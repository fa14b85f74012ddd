"""Stock transformers and peft, none of our code: the accuracy and loss of an exported adapter on given rows.

Run: python plain_evaluation.py BASE ADAPTER ROWS.json LENGTH
"""

import json
import sys

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main(base: str, adapter: str, file: str, length: int) -> None:
    with open(file, encoding="utf8") as rows:
        given = json.load(rows)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(given["classes"]))
    model = PeftModel.from_pretrained(model, adapter).eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for text, label in zip(given["texts"], given["labels"], strict=True):
            logits = model(**tokenizer(text, truncation=True, max_length=length, return_tensors="pt")).logits[0]
            right += int(logits.argmax() == label)
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(label)))
    assert "fedpeft" not in sys.modules
    print(json.dumps({"accuracy": right / len(given["texts"]), "loss": loss / len(given["texts"])}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
