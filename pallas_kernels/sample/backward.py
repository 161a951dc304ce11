"""Gradient of a token's log-probability; the pass over the logits is in `backward_xla` and `backward_sm90`."""

from pallas_kernels import registry


def forward(static, logits, ids):
    """(`op.token_logprobs`' results, what its gradient wants of them)."""
    top, backend = static
    kernel = registry.load("sample", backend)
    return registry.load_backward("sample", backend).forward(kernel, logits, ids, top=top)


def token_logprobs(static, operands, saved, cotangents):
    """Cotangents of (logits, ids); what is returned of the `top` largest has none."""
    _, backend = static
    return registry.load_backward("sample", backend).token_logprobs(*operands, saved, cotangents[0]), None
