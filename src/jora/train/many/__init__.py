"""Many adapters trained in one batch: see `jora.train.many.api.train_many`."""
