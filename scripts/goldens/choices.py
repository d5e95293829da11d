"""Goldens of answers chosen by likelihood: SmolLM2-135M-Instruct by transformers in float32, the protocol of
lm-evaluation-harness written out (`_encode_pair`, `multiple_choice`).

Run: python scripts/goldens/choices.py MODEL.gguf QUESTIONS.jsonl OUT_FOLDER
(the model that scripts/fetch-model prints; CommonsenseQA, MIT: lines with question, choices and answer).
Needs torch, transformers, gguf. Writes choices.json with the first 12 questions and the log-likelihoods of their choices.
"""
import json
import os
import sys

import torch
import transformers

TEMPLATE = "Question: {question}\nAnswer:"


def main():
    model_file, questions_file, out = sys.argv[1:]
    where, name = os.path.split(os.path.abspath(model_file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32).eval()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    questions = []
    for line in open(questions_file, encoding="utf-8").readlines()[:12]:
        line = json.loads(line)
        context = TEMPLATE.format(question=line["question"])
        n = len(encode(context))
        likelihoods = []
        for choice in line["choices"]:
            ids = encode(context + " " + choice)
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            rows = log_p[n - 1:-1].gather(1, torch.tensor(ids[n:])[:, None])
            likelihoods.append({"log": rows.sum().item(), "tokens": len(ids) - n})
        questions.append({
            "question": line["question"],
            "choices": line["choices"],
            "answer": line["answer"],
            "likelihoods": likelihoods,
        })
    with open(os.path.join(out, "choices.json"), "w") as f:
        json.dump({
            "made_by": f"scripts/goldens/choices.py, torch {torch.__version__}, transformers {transformers.__version__}",
            "questions": questions,
        }, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
