"""A LoRA added with a weight, and removed again bit for bit.

`python examples/lora.py MODEL LORA`: a checkpoint, and a LoRA that was trained on it.
"""

import sys

from omnigen_fast import OmniGenPipeline

model, lora = sys.argv[1:]
pipe = OmniGenPipeline.from_pretrained(model)
call = {"prompt": "a cat on a chair", "height": 256, "width": 256, "seed": 0}
pipe.load_lora_weights(lora, weight=0.8)
pipe(**call)[0].save("with_lora.png")
pipe.unload_lora_weights()
pipe(**call)[0].save("without_lora.png")
