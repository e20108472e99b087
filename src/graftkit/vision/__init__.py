"""Vision: a small image classifier, the rootstock, is cut out of a big pretrained network.

graft       the whole run: prepare, choose, train, measure, report
images/     files become pixels of one size, with classes and splits
donor       a pretrained network as a chain of layers; donors/ opens each kind of network
probe       pooled features of every layer for all images, and logistic regression on them
choose      the scion: which layers and features are read within a budget
rootstock   the network that results, its heads and its batch normalization
thinning    channels that can be removed
training    fine-tuning
baselines   what a rootstock is compared with
export      ONNX in float32 and int8
evaluate    accuracy, operations, latency and memory of ONNX files
results     graft.json, and the verdict; report draws the page
predict     classification in onnxruntime alone; foreign files are checked
"""
