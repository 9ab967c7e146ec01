"""Asks a question about a picture.

    make train-understanding
    python examples/ask_picture.py runs/understanding runs/easy-vqa/test/3.png "what color is it?"

The first argument is a run, one of its checkpoints, or a folder that `save_pretrained` wrote.
"""

import argparse

from tokenflow_ext.train.data import open_image
from tokenflow_ext.train.engine.messages import ending_in_one_line

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name in ("model", "picture", "question"):
    parser.add_argument(name)
arguments = parser.parse_args()

with ending_in_one_line():
    from tokenflow_ext.train.tasks.understanding import load_understanding  # needs transformers

    image = open_image(arguments.picture)
    model, processor = load_understanding(arguments.model)
    content = [{"type": "image", "image": image}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)
    print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
