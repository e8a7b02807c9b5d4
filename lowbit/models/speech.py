"""Keyword and digit recognition: a log-mel front end and a small convolutional network in one module.

Both networks take sound, float ``[N, T]``, and normalize after every convolution, which absorbs the gain of raw ±2^p
weights. The front end has no parameters, and none of its buffers is stored with the weights.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.extras import extra

with extra("speech", "a model of sound"):
    from torchvision.models.resnet import BasicBlock


def mel_bands(n_freqs: int, n_mels: int, sample_rate: int) -> Tensor:
    """Triangular mel bands with a peak of 1, float32 ``[n_freqs, n_mels]``, for frequencies from 0 to half the rate.

    Equal to the bit to ``torchaudio.functional.melscale_fbanks`` with its defaults (HTK scale, no normalization).

    Args:
        n_freqs: number of frequencies, evenly spaced.
        n_mels: number of bands.
        sample_rate: samples per second.
    """
    mels = torch.linspace(0, 2595 * math.log10(1 + sample_rate // 2 / 700), n_mels + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    distance = edges - torch.linspace(0, sample_rate // 2, n_freqs)[:, None]
    width = edges.diff()
    return torch.minimum(-distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]).clamp_min(0)


def _hide(x: Tensor, most: int, dim: int) -> Tensor:
    """``x`` ``[N, 1, bands, frames]`` with fewer than ``most`` neighbors along ``dim`` set to 0, drawn per clip."""
    size = x.shape[dim]
    width = torch.rand(x.shape[:2], device=x.device) * most
    first = (torch.rand(x.shape[:2], device=x.device) * (size - width)).long()[..., None, None]
    place = torch.arange(size, device=x.device).reshape(-1, 1) if dim == 2 else torch.arange(size, device=x.device)
    return x.masked_fill((place >= first) & (place < first + width.long()[..., None, None]), 0)


class LogMel(nn.Module):
    """Convert sound to a normalized log-mel spectrogram.

    Windows last 40 ms and start every 20 ms, as in Zhang et al. 2017, section 3. The power in decibels is clipped at
    ``top_db`` below the loudest point of the clip, then normalized to zero mean and unit variance over the clip. So
    neither the loudness of a clip nor the length of its silence changes the scale. Everything is computed in float32,
    under autocast too. The values equal those of torchaudio's ``MelSpectrogram`` and ``AmplitudeToDB``; torchaudio
    itself is not used because its last release, 2.11, cannot be imported beside newer CUDA builds of torch.

    Args:
        sample_rate: samples per second.
        n_mels: number of mel bands between 0 and half the sample rate.
        top_db: clipping level, in dB below the loudest point of the clip.
        freq_mask: SpecAugment (Park et al. 2019, arXiv 1904.08779): in training, up to this many neighboring bands
            of each clip are set to the mean; 0 for none.
        time_mask: SpecAugment in time: up to this many neighboring frames are set to the mean; 0 for none.

    Raises:
        LowbitError: ``n_mels`` is below 1, or another argument is negative.
    """

    window: Tensor
    bands: Tensor

    def __init__(
        self, sample_rate: int = 8000, n_mels: int = 20, top_db: float = 60.0, freq_mask: int = 0, time_mask: int = 0
    ):
        super().__init__()
        if n_mels < 1 or min(top_db, freq_mask, time_mask) < 0:
            given = f"n_mels={n_mels}, top_db={top_db}, freq_mask={freq_mask}, time_mask={time_mask}"
            raise LowbitError(f"{given} is not allowed: n_mels is at least 1, the others are at least 0")
        length = sample_rate * 40 // 1000
        self.hop, self.n_fft = length // 2, 1 << (length - 1).bit_length()
        self.top_db, self.freq_mask, self.time_mask = top_db, freq_mask, time_mask
        self.register_buffer("window", torch.hann_window(length), persistent=False)
        self.register_buffer("bands", mel_bands(self.n_fft // 2 + 1, n_mels, sample_rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, n_mels, frames]``, float32, of sound ``[N, T]``; ``1 + T // hop`` frames."""
        if x.ndim != 2:
            raise LowbitError(f"a batch of sound is [N, T], not {list(x.shape)}; this model takes sound")
        with torch.autocast(x.device.type, enabled=False):
            x = self._decibels(x.float()).unsqueeze(1)
            std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
            x = (x - mean) / (std + 1e-5)
            if self.training:
                x = _hide(x, self.freq_mask, 2) if self.freq_mask else x
                x = _hide(x, self.time_mask, 3) if self.time_mask else x
        return x

    def _decibels(self, x: Tensor) -> Tensor:
        """Power in each band in decibels, clipped at ``top_db``: ``[N, n_mels, frames]`` of sound ``[N, T]``."""
        window = self.window
        spectrum = torch.stft(x, self.n_fft, self.hop, len(window), window, pad_mode="reflect", return_complex=True)
        power = (spectrum.abs().pow(2).transpose(-1, -2) @ self.bands).transpose(-1, -2)
        decibels = 10 * torch.log10(power.clamp_min(1e-10))
        return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - self.top_db)


class DSCNN(nn.Module):
    """A depthwise-separable CNN for keywords, 24 k parameters.

    Zhang, Suda, Lai and Chandra, "Hello Edge: Keyword Spotting on Microcontrollers", arXiv 1711.07128, table 9 and
    section 4.5: a 10x4 convolution (time x frequency) of stride 2, four depthwise-separable blocks, average pooling.
    Width 64 as in the small variant; the first block has stride 2 as in the medium and the large one, since 40 log-mel
    bands are four times their 10 coefficients.

    Args:
        num_classes: number of outputs.
        sample_rate: samples per second.
        width: number of channels.
        blocks: number of depthwise-separable blocks.
        front: further arguments of `LogMel`.
    """

    def __init__(self, num_classes: int = 10, sample_rate: int = 8000, width: int = 64, blocks: int = 4, **front: Any):
        super().__init__()
        self.front = LogMel(sample_rate, **front)
        stem = nn.Conv2d(1, width, (4, 10), stride=2, padding=(1, 4), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(_separable(width, stride=1 if i else 2) for i in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of sound ``[N, T]``."""
        return self.fc(self.pool(self.blocks(self.stem(self.front(x)))).flatten(1))


class KWSResNet(nn.Module):
    """A residual network for keywords, modeled on res8: ordinary 3x3 convolutions only.

    Tang and Lin, "Deep Residual Learning for Small-Footprint Keyword Spotting", arXiv 1710.10361, table 1: a 3x3
    convolution, average pooling by 4x3 (time x frequency), three residual blocks of two convolutions, average pooling.
    Here normalization directly follows each convolution, because shift weights need it; in the paper it follows ReLU
    and the residual sum.

    Args:
        num_classes: number of outputs.
        sample_rate: samples per second.
        width: number of channels; 45 in the paper's res8 and 19 in its narrow variant.
        blocks: number of residual blocks.
        front: further arguments of `LogMel`.
    """

    def __init__(self, num_classes: int = 10, sample_rate: int = 8000, width: int = 32, blocks: int = 3, **front: Any):
        super().__init__()
        self.front = LogMel(sample_rate, **front)
        stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AvgPool2d((3, 4)))
        self.blocks = nn.Sequential(*(BasicBlock(width, width) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of sound ``[N, T]``."""
        return self.fc(self.pool(self.blocks(self.stem(self.front(x)))).flatten(1))


def _separable(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # In a depthwise convolution fan_out counts all channels, though each output sees only one; fan_in does not.
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
