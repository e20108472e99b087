"""Donors by origin: each file turns one kind of network into a chain of layers.

chain           the chain itself, and how a donor wants its images
mobilenet_npz   MobileNetV2 with batch normalization folded away, from an .npz file
vgg             VGG16, the donor of the paper
hub             ResNet, MobileNetV2, ConvNeXt and ViT of transformers; timm
modules         any torch module: an nn.Sequential, or whatever torch.fx can trace
traced          the cutting of a traced module
"""
