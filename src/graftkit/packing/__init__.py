"""The steps from two checkpoints to a SkillPack; `graftkit.pack` is the door.

job      the steps in order: scan, calibrate, measure, plan, encode, train
pairs    tensors of the target and the tuned model, two by two
measure  what every way to code a tensor costs and loses
budget   the bits of every tensor under a limit of bytes
encode   planned tensors as payloads, and the file around them
train    codes trained on rows, with a model that holds them
"""
