"""A corpus to tokens: sources in units, processes that decode and encode, finished shards.

``sources`` says which pictures become which shard, ``decoding`` reads them, ``encoding`` turns them
into tokens, ``writing`` keeps what is finished, and ``tokenize`` puts these together for one
process or torchrun's. ``ray_engine`` does the same with Ray Data.
"""
