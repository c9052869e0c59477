"""What the graphs say: streams, pairs, feed-forwards, which values hold which modality."""
