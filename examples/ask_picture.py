"""Asks a question about a picture, by a pipeline of transformers.

    make train-understanding
    python examples/ask_picture.py runs/understanding runs/easy-vqa/test/3.png "what color is it?"

The first argument is a run, one of its checkpoints, or a folder that `save_pretrained` wrote.
"""

import sys

from transformers import pipeline

from tokenflow_ext.train.data import open_image
from tokenflow_ext.train.engine.messages import ending_in_one_line
from tokenflow_ext.train.tasks.understanding import load_understanding

if len(sys.argv) != 4:
    sys.exit(__doc__)
with ending_in_one_line():
    run, picture, question = sys.argv[1:]
    image = {"type": "image", "image": open_image(picture)}
    model, processor = load_understanding(run)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
    settings = {"max_new_tokens": 32, "do_sample": False}
    print(ask(text=chat, return_full_text=False, generate_kwargs=settings)[0]["generated_text"])
