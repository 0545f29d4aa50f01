"""Pick the likeliest of several answers, and the text nearest in meaning."""

import hasten

llm = hasten.load("smollm2-135m")
answers = [" Paris", " Rome", " a potato"]
scores = [llm.score("The capital of France is", answer).total for answer in answers]
print("likeliest:", answers[scores.index(max(scores))])

texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose in March."]
vectors = llm.embed(texts)  # [3, hidden], each of length 1
print("similarity to the first:", [round(float(vectors[0] @ vector), 3) for vector in vectors])
