"""The definitions of image ops, sample by sample in plain Python: what every test compares with, autograd included."""

import itertools
import math

import torch


def floor(at):
    return math.floor(at.detach() if isinstance(at, torch.Tensor) else at)


def bordered(maps, y, x):
    """The value at ``(y, x)`` of ``maps (C, H, W)``, where a border of one pixel repeats the edge."""
    _, height, width = maps.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return maps.new_zeros(maps.shape[0])
    weights_y, weights_x = _edge(y, height), _edge(x, width)
    return sum(a * b * maps[:, i, j] for i, a in weights_y for j, b in weights_x)


def _edge(at, size):
    if at <= 0:
        return [(0, torch.ones((), dtype=torch.double))]
    low = floor(at)
    if low >= size - 1:
        return [(size - 1, torch.ones((), dtype=torch.double))]
    return [(low, low + 1 - at), (low + 1, at - low)]


def padded(maps, y, x):
    """The value at ``(y, x)`` of ``maps (C, H, W)`` that go on with zeros."""
    _, height, width = maps.shape
    out = maps.new_zeros(maps.shape[0])
    if not (-1 < y < height and -1 < x < width):
        return out
    for i in (floor(y), floor(y) + 1):
        for j in (floor(x), floor(x) + 1):
            if 0 <= i < height and 0 <= j < width:
                out = out + (1 - abs(y - i)) * (1 - abs(x - j)) * maps[:, i, j]
    return out


def _count(extent, samples):
    return samples if samples > 0 else max(0, math.ceil(extent))


def grid_values(maps, begin, extent, samples, turn=None, align=bordered):
    """All samples of a bin that begins at ``begin (y, x)``, row by row, with their positions."""
    rows, columns = (_count(float(extent[i]), samples) for i in (0, 1))
    found = []
    for i in range(rows):
        for j in range(columns):
            y = begin[0] + (i + 0.5) * extent[0] / rows
            x = begin[1] + (j + 0.5) * extent[1] / columns
            y, x = (y, x) if turn is None else turn(y, x)
            found.append((align(maps, y, x), y, x))
    return found


def _mean(values, channels):
    return sum(v for v, *_ in values) / len(values) if values else torch.zeros(channels, dtype=torch.double)


def _bins(rois, size, one):
    """``(R, C, h, w)`` from a function of RoI and bin."""
    return torch.stack(
        [
            torch.stack([torch.stack([one(roi, p, q) for q in range(size[1])], -1) for p in range(size[0])], -2)
            for roi in rois
        ]
    )


def _upright(roi, scale, aligned):
    x1, y1, x2, y2 = (roi[1 + i] * scale - (0.5 if aligned else 0) for i in range(4))
    size = [y2 - y1, x2 - x1]
    return [y1, x1], size if aligned else [s.clamp(min=1) for s in size]


def roi_align(x, rois, size, scale=1.0, samples=0, aligned=True, largest=False):
    def one(roi, p, q):
        begin, extent = _upright(roi, scale, aligned)
        bin_size = [extent[i] / size[i] for i in (0, 1)]
        corner = (begin[0] + p * bin_size[0], begin[1] + q * bin_size[1])
        values = grid_values(x[int(roi[0])], corner, bin_size, samples)
        return torch.stack([v for v, *_ in values]).amax(0) if largest else _mean(values, x.shape[1])

    return _bins(rois, size, one)


def roi_align_rotated(x, rois, size, scale=1.0, samples=0, aligned=True, clockwise=False):
    def one(roi, p, q):
        centre = [roi[2] * scale - (0.5 if aligned else 0), roi[1] * scale - (0.5 if aligned else 0)]
        extent = [roi[4] * scale, roi[3] * scale]
        if not aligned:
            extent = [e.clamp(min=1) for e in extent]
        angle = -roi[5] if clockwise else roi[5]
        bin_size = [extent[i] / size[i] for i in (0, 1)]
        begin = (-extent[0] / 2 + p * bin_size[0], -extent[1] / 2 + q * bin_size[1])

        def turn(v, u):
            return (
                v * angle.cos() - u * angle.sin() + centre[0],
                v * angle.sin() + u * angle.cos() + centre[1],
            )

        return _mean(grid_values(x[int(roi[0])], begin, bin_size, samples, turn), x.shape[1])

    return _bins(rois, size, one)


def riroi_align_rotated(x, rois, size, scale, samples, orientations, clockwise):
    found = roi_align_rotated(x, rois, size, scale, samples, False, clockwise)
    out = torch.zeros_like(found)
    for r, roi in enumerate(rois):
        turn = float(roi[5]) * orientations / (2 * math.pi)
        whole = math.floor(turn)
        for channel in range(found.shape[1]):
            own, group = channel % orientations, channel // orientations * orientations
            first, second = (own - whole) % orientations, (own - whole + 1) % orientations
            share = turn - whole
            out[r, channel] = (1 - share) * found[r, group + first] + share * found[r, group + second]
    return out


def bezier_align(x, beziers, size, scale=1.0, samples=0, aligned=True):
    def curve(points, u):
        a, b, c, d = points
        return (1 - u) ** 3 * a + 3 * u * (1 - u) ** 2 * b + 3 * u**2 * (1 - u) * c + u**3 * d

    def one(roi, p, q):
        points = roi[1:].view(8, 2) * scale
        upper, lower = points[:4], points[4:].flip(0)
        extent = torch.maximum((upper[0] - upper[3]).abs(), (lower[0] - lower[3]).abs())
        if not aligned:
            extent = extent.clamp(min=1)
        u, v = q / size[1], p / size[0]
        centre = curve(lower, u) * v + curve(upper, u) * (1 - v) - (0.5 if aligned else 0)
        bin_size = [extent[1] / size[0], extent[0] / size[1]]
        begin = (centre[1] - bin_size[0] / 2, centre[0] - bin_size[1] / 2)
        return _mean(grid_values(x[int(roi[0])], begin, bin_size, samples), x.shape[1])

    return _bins(beziers, size, one)


def deform_roi_pool(x, rois, offset, size, scale=1.0, samples=0, gamma=0.1):
    rois = list(rois)
    number = {id(roi): i for i, roi in enumerate(rois)}

    def one(roi, p, q):
        begin, extent = _upright(roi, scale, True)
        moved = [0, 0] if offset is None else [gamma * extent[i] * offset[number[id(roi)], 1 - i, p, q] for i in (0, 1)]
        bin_size = [extent[i] / size[i] for i in (0, 1)]
        corner = [begin[i] + moved[i] + (p, q)[i] * bin_size[i] for i in (0, 1)]
        return _mean(grid_values(x[int(roi[0])], corner, bin_size, samples), x.shape[1])

    return _bins(rois, size, one)


def roi_pool(x, rois, size, scale=1.0):
    def one(roi, p, q):
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        if x2 <= x1 or y2 <= y1:
            return x.new_zeros(x.shape[1])
        begin, bin_size = (y1, x1), ((y2 - y1) / size[0], (x2 - x1) / size[1])
        low = [min(max(math.floor((p, q)[i] * bin_size[i] + begin[i]), 0), x.shape[2 + i]) for i in (0, 1)]
        high = [min(max(math.ceil(((p, q)[i] + 1) * bin_size[i] + begin[i]), 0), x.shape[2 + i]) for i in (0, 1)]
        inside = x[int(roi[0]), :, low[0] : high[0], low[1] : high[1]].flatten(1)
        return inside.amax(1) if inside.shape[1] else x.new_zeros(x.shape[1])

    return _bins(rois, size, one)


def prroi_pool(x, rois, size, scale=1.0):
    """By Gauss's rule with two points in each cell between pixels, which is exact there."""

    def pieces(low, high):
        edges = [low, *(e for e in range(floor(low) + 1, floor(high) + 1) if low < e < high), high]
        for a, b in itertools.pairwise(edges):
            for sign in (-1, 1):
                yield (a + b) / 2 + sign * (b - a) / 2 / math.sqrt(3), (b - a) / 2

    def one(roi, p, q):
        x1, y1, x2, y2 = (roi[1 + i] * scale for i in range(4))
        if x2 <= x1 or y2 <= y1:
            return x.new_zeros(x.shape[1])
        bin_size = ((y2 - y1) / size[0], (x2 - x1) / size[1])
        begin = (y1 + p * bin_size[0], x1 + q * bin_size[1])
        total = sum(
            a * b * padded(x[int(roi[0])], v, u)
            for v, a in pieces(begin[0], begin[0] + bin_size[0])
            for u, b in pieces(begin[1], begin[1] + bin_size[1])
        )
        return total / (bin_size[0] * bin_size[1])

    return _bins(rois, size, one)


def border_align(x, boxes, pool_size):
    images, channels = len(x), x.shape[1] // 4
    out = []
    for n in range(images):
        for box in boxes[n]:
            x1, y1, x2, y2 = box
            lines = (
                ((y1, x1), (0, x2 - x1)),
                ((y1, x1), (y2 - y1, 0)),
                ((y2, x2), (0, x1 - x2)),
                ((y2, x2), (y1 - y2, 0)),
            )
            for k, (begin, step) in enumerate(lines):
                maps = x[n, k * channels : (k + 1) * channels]
                samples = [
                    bordered(maps, begin[0] + step[0] * i / pool_size, begin[1] + step[1] * i / pool_size)
                    for i in range(pool_size + 1)
                ]
                out.append(torch.stack(samples).amax(0))
    return torch.stack(out).view(images, boxes.shape[1], 4, channels).permute(0, 3, 1, 2)


def rotated_feature_align(x, boxes, scale, points):
    out = x.clone()
    for n in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                cy, cx, w, h, a = boxes[n, i, j]
                cy, cx, w, h = cy * scale, cx * scale, w * scale / 2, h * scale / 2
                at = [(cy, cx)]
                if points == 5:
                    for s, t in ((1, 1), (-1, 1), (-1, -1), (1, -1)):
                        at.append((cy + s * w * a.sin() + t * h * a.cos(), cx + s * w * a.cos() - t * h * a.sin()))
                out[n, :, i, j] = x[n, :, i, j] + sum(bordered(x[n], *position) for position in at)
    return out


def deform_conv2d(x, offset, weight, bias, mask, stride, padding, dilation, groups, deform_groups):
    kh, kw = weight.shape[2:]
    high, broad = offset.shape[2:]
    per_group, per_offset = x.shape[1] // groups, x.shape[1] // deform_groups
    out = []
    for n in range(len(x)):
        for i in range(high):
            for j in range(broad):
                columns = x.new_zeros((x.shape[1], kh * kw))
                for d in range(deform_groups):
                    maps = x[n, d * per_offset : (d + 1) * per_offset]
                    for k in range(kh * kw):
                        at = 2 * (d * kh * kw + k)
                        y = i * stride[0] - padding[0] + k // kw * dilation[0] + offset[n, at, i, j]
                        z = j * stride[1] - padding[1] + k % kw * dilation[1] + offset[n, at + 1, i, j]
                        value = padded(maps, y, z)
                        if mask is not None:
                            value = value * mask[n, d * kh * kw + k, i, j]
                        columns = columns.clone()
                        columns[d * per_offset : (d + 1) * per_offset, k] = value
                for g in range(groups):
                    rows = weight[g * (len(weight) // groups) : (g + 1) * (len(weight) // groups)].flatten(1)
                    out.append(rows @ columns[g * per_group : (g + 1) * per_group].flatten())
    out = torch.stack(out).view(len(x), high, broad, -1).permute(0, 3, 1, 2)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def deform_attention(value, sizes, starts, locations, weights):
    images, queries, heads, levels, points, _ = locations.shape
    out = []
    for n in range(images):
        for q in range(queries):
            for h in range(heads):
                total = value.new_zeros(value.shape[3])
                for level in range(levels):
                    height, width = sizes[level].tolist()
                    first = int(starts[level])
                    maps = value[n, first : first + height * width, h].t().reshape(-1, height, width)
                    for p in range(points):
                        x, y = locations[n, q, h, level, p]
                        total = total + weights[n, q, h, level, p] * padded(maps, y * height - 0.5, x * width - 0.5)
                out.append(total)
    return torch.stack(out).view(images, queries, -1)


def carafe(x, masks, kernel_size, groups, scale):
    out = x.new_zeros((len(x), x.shape[1], x.shape[2] * scale, x.shape[3] * scale))
    half, per_group = kernel_size // 2, x.shape[1] // groups
    for c in range(x.shape[1]):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                for a in range(kernel_size):
                    for b in range(kernel_size):
                        y, z = i // scale + a - half, j // scale + b - half
                        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                            k = (c // per_group * kernel_size + a) * kernel_size + b
                            out[:, c, i, j] = out[:, c, i, j] + x[:, c, y, z] * masks[:, k, i, j]
    return out


def psa_mask(masks, mask_size, distribute):
    images, _, height, width = masks.shape
    out = masks.new_zeros((images, height * width, height, width))
    for i in range(height):
        for j in range(width):
            for a in range(mask_size[0]):
                for b in range(mask_size[1]):
                    y, z = i + a - (mask_size[0] - 1) // 2, j + b - (mask_size[1] - 1) // 2
                    if 0 <= y < height and 0 <= z < width:
                        value = masks[:, a * mask_size[1] + b, i, j]
                        if distribute:
                            out[:, i * width + j, y, z] = value
                        else:
                            out[:, y * width + z, i, j] = value
    return out


def correlation(first, second, kernel, patch, stride, padding, dilation, patch_dilation):
    images, _, height, width = first.shape
    high, broad = (
        (first.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    out = first.new_zeros((images, *patch, high, broad))
    for p in range(patch[0]):
        for q in range(patch[1]):
            for i in range(high):
                for j in range(broad):
                    for a in range(kernel[0]):
                        for b in range(kernel[1]):
                            y = i * stride[0] - padding[0] + a * dilation[0]
                            x = j * stride[1] - padding[1] + b * dilation[1]
                            v = y + p * patch_dilation[0] - patch_dilation[0] * (patch[0] - 1) // 2
                            u = x + q * patch_dilation[1] - patch_dilation[1] * (patch[1] - 1) // 2
                            if all(0 <= s < height for s in (y, v)) and all(0 <= s < width for s in (x, u)):
                                product = (first[:, :, y, x] * second[:, :, v, u]).sum(1)
                                out[:, p, q, i, j] = out[:, p, q, i, j] + product
    return out
