"""From source models to a SkillPack: sample, score, select, train, pack.

config      the one file that says everything
pipeline    the stages in order; what is done is not done again
sources/    who answers, and sampling their answers
scores/     what an answer is worth, and scoring all of them
selection   rows for SFT, pairs for DPO; template turns them into text
training    SFT and DPO on TRL; trainers has what TRL lacks
alignment, distributions, collecting, hidden, losses    explicit transfer
"""
