"""The part of make_references.py that runs SmolLM2-135M-Instruct, from its dequantised GGUF, in torch."""

import json
from pathlib import Path

import gguf
import jinja2
import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a short poem about the sea.",
    "What is 17 + 25? Answer with the number only.",
    "Explain to a child why the sky is blue.",
    "Translate into French: The weather is nice today.",
)
NEW_TOKENS = 64
LOGIT_STEPS = (0, 1, 31)
CONTROL = 3


def make_smollm2(path: Path, folder: Path) -> None:
    """Writes prompts.json and reference.npz into `folder`; README.md says what they hold."""
    torch.set_num_threads(2)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    model = load(reader, fields)
    encode, decode = tokenizer(fields)
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        fields["tokenizer.chat_template"]
    )
    eos = fields["tokenizer.ggml.eos_token_id"]
    entries, rows, gaps = [], [], []
    for prompt in PROMPTS:
        text = template.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = encode(text)
        output, logits = greedy(model, ids)
        best = np.sort(logits, axis=1)
        gaps.append(best[:, -1] - best[:, -2])
        rows.append(logits[list(LOGIT_STEPS)])
        ends = [i for i, token in enumerate(output) if token == eos]
        answer = decode(output[: ends[0]] if ends else output)
        print(f"{prompt}\n  {answer!r}\n  smallest gap of the two best {gaps[-1].min():.1e}")
        entries.append({"prompt": prompt, "text": text, "ids": ids, "output": output, "eos_at": ends})
    passage = encode((folder / "passage.txt").read_text(encoding="utf-8"))
    nll = negative_log_likelihood(model, passage)
    print(f"passage: {len(passage)} tokens, perplexity {np.exp(nll / (len(passage) - 1)):.4f}")
    np.savez_compressed(
        folder / "reference.npz",
        logits=np.stack(rows),
        gaps=np.stack(gaps),
        passage_ids=np.asarray(passage, np.int32),
        passage_nll=nll,
    )
    (folder / "prompts.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def load(reader: gguf.GGUFReader, fields: dict) -> LlamaForCausalLM:
    """The model in float32; GGUF's interleaved q and k rows go back to Hugging Face's two halves."""
    get = lambda key: fields[f"llama.{key}"]  # noqa: E731
    config = LlamaConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    weights = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {t.name: t for t in reader.tensors}
    model = LlamaForCausalLM(config).eval()
    for key, parameter in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        tensor = tensors[names.get_name(key, try_suffixes=(".weight",))]
        value = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(parameter.shape))
        if "q_proj" in key or "k_proj" in key:
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = value.reshape(heads, -1, 2, config.hidden_size).swapaxes(1, 2).reshape(value.shape)
        weights[key] = torch.from_numpy(np.array(value, np.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    return model


def tokenizer(fields: dict):
    """(encode, decode) from the GGUF's vocabulary: single digits, then byte-level BPE."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
    bpe = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types) if kind == CONTROL]  # noqa: B905
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return (lambda text: bpe.encode(text).ids), bpe.decode


@torch.no_grad()
def greedy(model: LlamaForCausalLM, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """NEW_TOKENS ids, past any end token, and the float32 logits [NEW_TOKENS, vocab] that chose them."""
    out = model(input_ids=torch.tensor([ids]), use_cache=True)
    output, logits = [], []
    for _ in range(NEW_TOKENS):
        logits.append(out.logits[0, -1].numpy())
        output.append(int(logits[-1].argmax()))
        out = model(
            input_ids=torch.tensor([output[-1:]]), past_key_values=out.past_key_values, use_cache=True
        )
    return output, np.stack(logits)


@torch.no_grad()
def negative_log_likelihood(model: LlamaForCausalLM, ids: list[int]) -> np.float64:
    """Sum over tokens 1… of −log p, in float64 from float32 logits."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[1:])[:, None])
    return -chosen.sum().numpy()
