"""One layer of the transformer with its gradients written out.

On a CPU most of such a small layer's time goes to passes over memory that automatic
differentiation adds: float32 copies within norms, concatenations where a tensor was split, sums of
gradients. Here a norm's weight is folded into the product behind it, rotations work in place, and
parts are written where they are read. A test holds the gradients to finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What every layer needs to know of its rows: a condition, then draws of equal length."""

    cos: Tensor  # [batch, 1, length + draws * rows, head_dim / 2]
    sin: Tensor
    # added to scores, for each of batch * heads:
    condition_bias: Tensor  # [batch * heads, length, length]
    seen_bias: Tensor  # [batch * heads, 1, length], a draw's view of the condition
    own_bias: Tensor  # [rows, rows], a draw's view of itself
    length: int
    draws: int
    heads: int
    eps: float

    @property
    def rows(self) -> int:
        return self.own_bias.shape[0]


class Layer(torch.autograd.Function):
    """`stream + attention(norm(stream))`, then the same with the MLP.

    The last layer returns the draws alone, as nothing reads the condition behind its keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,  # [batch, length + draws * rows, hidden]
        input_norm: Tensor,
        qkv_proj: Tensor,
        o_proj: Tensor,
        post_norm: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        layout: Layout,
        last: bool,
    ) -> Tensor:
        batch, total, hidden = stream.shape
        rows_in = stream.reshape(-1, hidden)
        factor, normed = _normalized(rows_in, layout.eps)
        folded_qkv = qkv_proj * input_norm
        qkv = F.linear(normed, folded_qkv).view(batch, total, 3 * layout.heads, -1)
        qkv = qkv.transpose(1, 2).contiguous()  # [batch, 3 * heads, rows, head_dim]
        _rotate_(qkv[:, : 2 * layout.heads], layout.cos, layout.sin)
        attended, probabilities = _attend(qkv, layout, last)
        kept = stream[:, layout.length :] if last else stream
        attended = attended.transpose(1, 2).reshape(-1, o_proj.shape[1])
        middle = torch.addmm(kept.reshape(-1, hidden), attended, o_proj.T)

        post_factor, post_normed = _normalized(middle, layout.eps)
        folded_gate_up = gate_up_proj * post_norm
        gate_up = F.linear(post_normed, folded_gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        product = activated * up
        out = torch.addmm(middle, product, down_proj.T)
        ctx.layout, ctx.last, ctx.shape = layout, last, stream.shape
        ctx.save_for_backward(
            *(input_norm, qkv_proj, o_proj, post_norm, gate_up_proj, down_proj),
            *(factor, normed, folded_qkv, qkv, attended, *probabilities),
            *(post_factor, post_normed, folded_gate_up, gate_up, activated, product),
        )
        return out.view(batch, -1, hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        saved = list(ctx.saved_tensors)
        input_norm, qkv_proj, o_proj, post_norm, gate_up_proj, down_proj = saved[:6]
        factor, normed, folded_qkv, qkv, attended = saved[6:11]
        *probabilities, post_factor, post_normed, folded_gate_up, gate_up, activated, product = (
            saved[11:]
        )
        batch, total, hidden = ctx.shape
        grad = grad.reshape(-1, hidden)
        grad_down = grad.T @ product
        grad_product = grad @ down_proj
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_product, activated, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_product.mul_(up), gate))
        grad_folded = grad_gate_up.T @ post_normed
        grad_middle = _through_norm(grad_gate_up @ folded_gate_up, post_normed, post_factor, grad)
        grad_gate_up_proj = grad_folded * post_norm
        grad_post_norm = (grad_folded * gate_up_proj).sum(0)

        grad_o = grad_middle.T @ attended
        grad_attended = (grad_middle @ o_proj).view(batch, -1, layout.heads, qkv.shape[3])
        grad_qkv = _attend_backward(grad_attended, qkv, probabilities, layout)
        _rotate_(grad_qkv[:, : 2 * layout.heads], layout.cos, -layout.sin)
        grad_qkv = grad_qkv.transpose(1, 2).reshape(batch * total, -1)
        grad_folded = grad_qkv.T @ normed
        beside = grad_middle
        if ctx.last:
            beside = F.pad(grad_middle.view(batch, -1, hidden), (0, 0, layout.length, 0))
            beside = beside.view(-1, hidden)
        grad_stream = _through_norm(grad_qkv @ folded_qkv, normed, factor, beside)
        return (
            grad_stream.view(ctx.shape),
            (grad_folded * qkv_proj).sum(0),
            grad_folded * input_norm,
            grad_o,
            grad_post_norm,
            grad_gate_up_proj,
            grad_down,
            None,
            None,
        )


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The factor of each row, and the rows times it: RMSNorm without its weight."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).to(
        torch.promote_types(x.dtype, torch.float32)
    )
    factor = (norms.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
    return factor, x * factor


def _through_norm(grad: Tensor, normed: Tensor, factor: Tensor, beside: Tensor) -> Tensor:
    """The gradient at a norm's input, added to that of the path beside it; overwrites `grad`."""
    mean = (grad * normed).mean(-1, keepdim=True)
    return torch.addcmul(beside, grad.addcmul_(normed, mean, value=-1), factor)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates pairs (i, i + head_dim / 2) in place."""
    a, b = x.chunk(2, dim=-1)
    old = a.clone()
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(old, sin)


def _split(qkv: Tensor, heads: int) -> list[Tensor]:  # [batch * heads, rows, head_dim] each
    return [part.flatten(0, 1) for part in qkv.split(heads, dim=1)]


def _attend(qkv: Tensor, layout: Layout, last: bool) -> tuple[Tensor, list[Tensor]]:
    """What each row attends to, [batch, heads, rows, head_dim], and the probabilities.

    The draws share the condition's keys: one product for all of them.
    """
    length, draws, rows = layout.length, layout.draws, layout.rows
    batch, _, total, head_dim = qkv.shape
    scale = head_dim**-0.5
    query, key, value = _split(qkv, layout.heads)
    own_query, own_key, own_value = (_own(x, layout) for x in (query, key, value))
    scores = query.new_empty(len(query), draws * rows, length + rows)
    torch.add(
        layout.seen_bias,
        torch.bmm(query[:, length:], key[:, :length].mT),
        alpha=scale,
        out=scores[..., :length],
    )
    over_own = torch.bmm(own_query, own_key.mT).view(-1, draws, rows, rows)
    torch.add(
        layout.own_bias,
        over_own,
        alpha=scale,
        out=scores[..., length:].unflatten(1, (draws, rows)),
    )
    probabilities = torch.softmax(scores, dim=-1)
    attended = query.new_empty(len(query), total - (length if last else 0), head_dim)
    noise = attended[:, -draws * rows :]
    torch.bmm(probabilities[..., :length], value[:, :length], out=noise)
    own = torch.bmm(_own_part(probabilities, layout), own_value)
    noise += own.view(noise.shape)
    if last:
        return attended.unflatten(0, (batch, -1)), [probabilities]
    scores = torch.bmm(query[:, :length], key[:, :length].mT)
    of_condition = torch.softmax(torch.add(layout.condition_bias, scores, alpha=scale), dim=-1)
    torch.bmm(of_condition, value[:, :length], out=attended[:, :length])
    return attended.unflatten(0, (batch, -1)), [probabilities, of_condition]


def _attend_backward(
    grad: Tensor,  # [batch, rows, heads, head_dim]
    qkv: Tensor,
    probabilities: list[Tensor],
    layout: Layout,
) -> Tensor:  # as qkv
    length, draws, rows = layout.length, layout.draws, layout.rows
    scale = qkv.shape[3] ** -0.5
    grad = grad.transpose(1, 2).flatten(0, 1)  # [batch * heads, rows, head_dim]
    query, key, value = _split(qkv, layout.heads)
    own_query, own_key, own_value = (_own(x, layout) for x in (query, key, value))
    noise_grad = grad[:, -draws * rows :].contiguous()
    own_grad = noise_grad.view(-1, rows, noise_grad.shape[2])

    of_noise = probabilities[0]
    over = torch.empty_like(of_noise)
    over[..., :length] = torch.bmm(noise_grad, value[:, :length].mT)
    over_own = torch.bmm(own_grad, own_value.mT).view(-1, draws * rows, rows)
    over[..., length:] = over_own
    over = torch.ops.aten._softmax_backward_data(over, of_noise, -1, over.dtype).mul_(scale)
    seen, own = over[..., :length], _own_part(over, layout)
    shape = len(qkv), layout.heads, -1, qkv.shape[3]
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    noise_query = torch.bmm(own, own_key).view(noise_grad.shape)
    grad_query[:, length:] = noise_query.baddbmm_(seen, key[:, :length])
    grad_key[:, length:] = torch.bmm(own.mT, own_query).view(noise_grad.shape)
    own_probabilities = _own_part(of_noise, layout)
    grad_value[:, length:] = torch.bmm(own_probabilities.mT, own_grad).view(noise_grad.shape)
    condition_key = torch.bmm(seen.mT, query[:, length:])
    condition_value = torch.bmm(of_noise[..., :length].mT, noise_grad)
    if len(probabilities) == 1:
        grad_query[:, :length] = 0
    else:
        of_condition, condition_grad = probabilities[1], grad[:, :length]
        over = torch.bmm(condition_grad, value[:, :length].mT)
        over = torch.ops.aten._softmax_backward_data(over, of_condition, -1, over.dtype)
        over.mul_(scale)
        grad_query[:, :length] = torch.bmm(over, key[:, :length])
        condition_key.baddbmm_(over.mT, query[:, :length])
        condition_value.baddbmm_(of_condition.mT, condition_grad)
    grad_key[:, :length], grad_value[:, :length] = condition_key, condition_value
    return torch.cat([part.view(shape) for part in (grad_query, grad_key, grad_value)], dim=1)


def _own(x: Tensor, layout: Layout) -> Tensor:  # [batch * heads * draws, rows, head_dim]
    """The draws' rows of [batch * heads, rows, head_dim]."""
    return x[:, layout.length :].reshape(-1, layout.rows, x.shape[2])


def _own_part(x: Tensor, layout: Layout) -> Tensor:  # [batch * heads * draws, rows, rows]
    """Of scores or probabilities, what a draw sees of itself."""
    return x[..., layout.length :].reshape(-1, layout.rows, layout.rows)
