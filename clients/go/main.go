// Denoises an image, draws two and reads the details of two errors; prints one JSON object.
//
//	denoise 127.0.0.1:50051 fashion-els
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pb "example.com/els/denoisev1"
)

type failure struct {
	Code        int      `json:"code"`
	Fields      []string `json:"fields"`
	RetryAfterS *float64 `json:"retryAfterS"`
}

// Pixels are float32, little-endian, in C order.
func tensorOf(pixels []float32, shape ...int64) *pb.Tensor {
	data := make([]byte, 4*len(pixels))
	for i, pixel := range pixels {
		binary.LittleEndian.PutUint32(data[4*i:], math.Float32bits(pixel))
	}
	return &pb.Tensor{Dtype: pb.DType_DTYPE_F32, Shape: shape, Data: data}
}

func pixelsOf(tensor *pb.Tensor) []float32 {
	pixels := make([]float32, len(tensor.GetData())/4)
	for i := range pixels {
		pixels[i] = math.Float32frombits(binary.LittleEndian.Uint32(tensor.GetData()[4*i:]))
	}
	return pixels
}

// The details of a failed call: google.rpc.Status in its trailer.
func detailsOf(err error) failure {
	found := failure{Code: int(status.Code(err)), Fields: []string{}}
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				found.Fields = append(found.Fields, violation.GetField())
			}
		case *errdetails.RetryInfo:
			delay := detail.GetRetryDelay()
			seconds := float64(delay.GetSeconds()) + float64(delay.GetNanos())/1e9
			found.RetryAfterS = &seconds
		}
	}
	return found
}

// Returns the steps' numbers, and the images of the last.
func sample(ctx context.Context, client pb.DenoiserServiceClient, request *pb.SampleRequest) (
	steps []int32, drawn []float32, err error,
) {
	stream, err := client.Sample(ctx, request)
	for err == nil {
		var step *pb.SampleResponse
		if step, err = stream.Recv(); err == io.EOF {
			return steps, drawn, nil
		} else if err == nil {
			steps, drawn = append(steps, step.GetIndex()), pixelsOf(step.GetX())
		}
	}
	return nil, nil, err
}

func main() {
	target, model := os.Args[1], os.Args[2]
	// Answers of 4 MiB are accepted unless another limit is given.
	unlimited := grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32))
	connection, err := grpc.Dial(target, grpc.WithInsecure(), unlimited)
	check(err)
	defer connection.Close()
	client := pb.NewDenoiserServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	described, err := client.GetModel(ctx, &pb.GetModelRequest{Name: model})
	check(err)
	size := described.GetModel()
	pixels := make([]float32, size.GetChannels()*size.GetHeight()*size.GetWidth())
	for i := range pixels {
		pixels[i] = float32(i%17)/8 - 1
	}
	x := tensorOf(pixels, 1, size.GetChannels(), size.GetHeight(), size.GetWidth())
	at := func(sigma, timeout float64) *pb.DenoiseRequest {
		level := &pb.NoiseLevel{Sigma: []float64{sigma}}
		return &pb.DenoiseRequest{Model: model, X: x, Level: level, TimeoutS: timeout}
	}
	answer, err := client.Denoise(ctx, at(0.5, 0))
	check(err)
	steps, drawn, err := sample(ctx, client, &pb.SampleRequest{Model: model, Count: 2, Steps: 4, Seed: 7})
	check(err)
	_, invalid := client.Denoise(ctx, at(-1, 0))
	_, late := client.Denoise(ctx, at(0.5, 1e-9))
	text, err := json.Marshal(map[string]interface{}{
		"denoised": pixelsOf(answer.GetDenoised()), "steps": steps, "drawn": drawn,
		"invalid": detailsOf(invalid), "late": detailsOf(late),
	})
	check(err)
	fmt.Println(string(text))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
