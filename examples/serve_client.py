"""Query a reward server: scores, a comparison, and its use as a TRL reward function.

disco-trl serve runs/quickstart/disco --dtype bfloat16 &
python examples/serve_client.py http://127.0.0.1:8000

{'status': 'ready', 'model': 'runs/quickstart/disco', 'family': 'normal', 'transform': 'mean', ...}
 4.49 ± 1.45   10 % quantile  2.63   What a lovely evening!
-1.86 ± 1.01   10 % quantile -3.15   The bus was late again.
-1.43 ± 1.03   10 % quantile -2.75   I do not know what to say.
P(1st ≻ 2nd) = 1.00   P(3rd ≻ 2nd) = 0.62
[2.6404244899749756, -2.5791730880737305]
"""

import sys

from disco_trl.serving.client import RemoteReward, ScoreClient


url = sys.argv[1]
texts = ["What a lovely evening!", "The bus was late again.", "I do not know what to say."]

client = ScoreClient(url)
print(client.health())
answer = client.score(items=texts, pairs=[[0, 1], [2, 1]], transform="quantile", q=0.1)
for text, result in zip(texts, answer["results"], strict=True):
    print(f"{result['location']:5.2f} ± {result['scale']:.2f}   10 % quantile {result['reward']:5.2f}   {text}")
print(f"P(1st ≻ 2nd) = {answer['prob_greater'][0]:.2f}   P(3rd ≻ 2nd) = {answer['prob_greater'][1]:.2f}")

# As in GRPOTrainer(reward_funcs=reward): the model is on the server, and the transform is applied here.
reward = RemoteReward(url, transform="lower_bound", k=1.0)
print(reward(prompts=["The concert in the park"] * 2, completions=[" was a joy.", " was too loud."]))
