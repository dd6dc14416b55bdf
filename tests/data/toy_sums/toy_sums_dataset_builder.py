"""A small tensorflow_datasets dataset, built in the tests as a user's own would be."""

import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """Sums with text, numbers, nested features and a conversation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "question": text,
            "answer": np.int64,
            "tags": tfds.features.Sequence(text),
            "dialogue": tfds.features.Sequence({"role": text, "content": text}),
            "meta": {
                "hard": np.bool_,
                "weight": np.float32,
                "grid": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            },
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 10), "test": self._generate_examples(10, 13)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield (
                i,
                {
                    "question": f"é\n{i}+{i}=",
                    "answer": 2 * i,
                    "tags": ["sum", f"n{i}"],
                    "dialogue": [
                        {"role": "system", "content": "Add."},
                        {"role": "user", "content": f"{i}+{i}"},
                    ],
                    "meta": {"hard": i > 5, "weight": 0.5, "grid": [i, i]},
                },
            )
