"""The construction of an editing dataset out of pictures: the seed's automated pipeline, one file a step."""
