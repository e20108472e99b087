"""The steps from two checkpoints to a SkillPack. The public function is in `graftkit.pack`.

job      the steps in order: scan, calibrate, measure, plan, encode, train
pairs    tensors of the target and of the tuned model in pairs
sampled  calibration rows that the two models write
measure  digests, calibration statistics, and the energies of deltas
budget   a precision for every tensor within the budget
encode   records and payloads of tensors, and the pack around them
train    code training against the tuned model
student  the packed model during code training
"""
