"""ResNet-20 and its relatives for 32x32 images, assembled from torchvision's blocks.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2: a 3x3 stem and three
stages of n blocks with 16, 32 and 64 channels, 6n+2 layers. As in most later work, the shortcut where the shape
changes is a 1x1 convolution (option B).
"""

from torch import Tensor, nn

from lowbit.extras import extra

with extra("models", "a small ResNet"):
    from torchvision.models.resnet import BasicBlock


class SmallResNet(nn.Module):
    """A ``6n+2``-layer ResNet for small images of any size.

    Args:
        blocks: number of blocks n in each stage.
        num_classes: number of outputs.
        in_chans: number of input channels.
        width: number of channels in the first stage.
    """

    def __init__(self, blocks: int = 3, num_classes: int = 10, in_chans: int = 3, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
