"""The wording of the templates that are known by name, as their sources have it.

The space or newline at a joint belongs to the answer's side: a prompt that ends in a space would be
tokenised differently in training (" The" is one token) and in use (" " stands alone).
"""

from __future__ import annotations

ALPACA = (  # Stanford Alpaca's wording, with and without an input
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
VICUNA = (  # FastChat's vicuna_v1.1
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

TEXT_TEMPLATES: dict[str, dict[str, str]] = {
    "alpaca": {
        "preamble": ALPACA,
        "preamble_with_context": ALPACA_WITH_INPUT,
        "question": "### Instruction:\n{content}\n\n",
        "question_with_context": "### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
        "answer_cue": "### Response:",
        "answer": " {content}",
        "separator": "\n\n",
    },
    "instruction-response": {
        "question": "### Instruction:\n{content}\n\n",
        "answer_cue": "### Response:\n",
        "answer": "{content}",
        "separator": "\n\n",
    },
    # Nothing but the text itself, for bases that continue it; an answer follows after a space.
    "plain": {"question": "{content}", "answer_cue": "", "answer": " {content}"},
    # The spacing of the openassistant-guanaco rows, which the published Guanaco adapters saw.
    "guanaco": {
        "question": "### Human: {content}",
        "answer_cue": "### Assistant:",
        "answer": " {content}",
    },
    "vicuna": {
        "preamble": VICUNA,
        "system": "{content} ",
        "question": "USER: {content} ",
        "answer_cue": "ASSISTANT:",
        "answer": " {content}",
    },
    "chatml": {
        "system": "<|im_start|>system\n{content}<|im_end|>\n",
        "question": "<|im_start|>user\n{content}<|im_end|>\n",
        "answer_cue": "<|im_start|>assistant\n",
        "answer": "{content}",
        "stop": "<|im_end|>",
        "separator": "\n",
    },
    "llama2": {  # Meta's llama repository: a BOS before every question, EOS after every answer
        "question": "{bos}[INST] {content} [/INST]",
        "question_with_system": "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
        "answer_cue": "",
        "answer": " {content} ",
    },
    "llama3": {
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        "question": "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        "answer_cue": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "answer": "{content}",
        "stop": "<|eot_id|>",
    },
}
"""Fields of ``TextTemplate`` by the template's name."""
