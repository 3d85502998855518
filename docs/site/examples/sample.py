from els_client import Client

with Client("127.0.0.1:50051") as client:
    for step in client.sample(model="fashion-els", count=2, label=[0, 1], steps=4, seed=7):
        print(f"{step.index}/{step.total} alpha_bar={step.alpha_bar:.2f}")
print(step.x.shape)  # the last step has the images, float32 [2, C, H, W] in [-1, 1]
