"""What the tests share: launching ranks, oracles, small models, the stand-in GPU, the pytest plugin."""
