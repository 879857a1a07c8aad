#!/usr/bin/env python3
"""Writes two small tasks of lm-eval, of what the nano model knows, and a text for clients that want one.

    lm_eval_tasks.py tests/nano/conversations.json DIRECTORY

`nano_generate`: answers in words, which must be those that the reference gives. `nano_choose`: capitals; the right
one must be the likeliest continuation. `book.txt`: text that nano's vocabulary can spell.
"""

import json
import pathlib
import sys

KINDS = ("fact", "add", "count", "as_json", "repeat")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Ghana": "Accra", "Cuba": "Havana", "Canada": "Ottawa"}
CAPITALS |= {"Chile": "Santiago", "Sweden": "Stockholm", "Austria": "Vienna", "Peru": "Lima"}
BOOK_COPIES = 20

GENERATE = """task: nano_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 200, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
# Special tokens by name: the tokenizer makes ids of them, and ids are what is sent.
CHOOSE = """task: nano_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def questions(cases):
    """The last turn of each, and its answer without the reasoning."""
    for case in cases:
        if case["kind"] in KINDS:
            answer = case["completion"].split("</think>")[-1].removesuffix("<｜end▁of▁sentence｜>")
            yield {"question": case["messages"][-1]["content"], "answer": answer}


def choices():
    names = list(CAPITALS.values())
    for i, (country, capital) in enumerate(CAPITALS.items()):
        others = [name for name in names[i:] + names[:i] if name != capital][:3]
        label = i % 4
        others.insert(label, capital)
        question = f"What is the capital of {country}?"
        prompt = f"<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜></think>The capital of {country} is"
        yield {"prompt": prompt, "choices": [f" {name}." for name in others], "label": label}


def main():
    cases = json.loads(pathlib.Path(sys.argv[1]).read_text())["cases"]
    directory = pathlib.Path(sys.argv[2]).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    for name, text, documents in (("nano_generate", GENERATE, questions(cases)), ("nano_choose", CHOOSE, choices())):
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (directory / f"{name}.yaml").write_text(text.format(data=json.dumps(str(data))))
    turns = [message["content"] for case in cases for message in case["messages"] if message["content"]]
    (directory / "book.txt").write_text(("\n".join(turns) + "\n") * BOOK_COPIES)


if __name__ == "__main__":
    main()
