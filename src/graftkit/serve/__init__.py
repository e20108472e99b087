"""Serve: one copy of the target, every pack, each request its own.

cache     keys and values of running requests, a slot each
decoder   one forward pass over rows of different lengths
sampling  the next token of one row, its log probability, and the text of an answer
style     how the target or a pack reads prompts and ends answers
engine    the thread that runs requests; packs that come and go
models    what the `model` of a request names: the target, a pack, a mixture, or the router's choice
protocol  requests and answers as the OpenAI API writes them
guard     keys and limits in front of every route
app       the routes
"""
