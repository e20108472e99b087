"""From source models to a pack: sample answers, score and select them, train the target, pack.

config      the settings of a run, from one TOML file
pipeline    the stages in order, and what each does; a finished stage is not repeated
workspace   the folder of a run: finished stages, and what all stages need
sample      prompts, and the sources' answers to them
sources/    a local model, an endpoint, or a file of answers
scores/     what an answer is worth: rules, reward models, judges
select      rows for SFT and pairs for DPO, data card, model card and provenance
training    SFT and DPO on TRL, with what TRL lacks
transfer/   explicit transfer: distributions and hidden states of the sources
estimate    what a run will take
records     prompts, answers and scores as JSON Lines
"""
