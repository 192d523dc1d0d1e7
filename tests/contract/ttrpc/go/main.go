// A test's independent peer: containerd's own ttrpc, as a client and as a server of any service.
//
// Messages come as a FileDescriptorSet and as JSON, so that nothing is generated and nothing of Remora is in here.
//
//	peer client <socket> <descriptors>   reads calls from stdin, one JSON object a line, answers a line for each
//	peer server <socket> <descriptors>   reads the answers of its methods from stdin (one line), then serves
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

const maxLine = 64 << 20

type call struct {
	Service  string            `json:"service"`
	Method   string            `json:"method"`
	Request  string            `json:"request_type"`
	Response string            `json:"response_type"`
	Messages []json.RawMessage `json:"messages"` // one for a unary call
	Stream   bool              `json:"stream"`
}

type answer struct {
	Code     uint32          `json:"code"`
	Message  string          `json:"message"`
	Details  [][]byte        `json:"details"` // the values, base64 in JSON
	Response json.RawMessage `json:"response"`
}

type method struct {
	Service  string          `json:"service"`
	Method   string          `json:"method"`
	Request  string          `json:"request_type"`
	Response string          `json:"response_type"`
	Answer   json.RawMessage `json:"answer"`
	Code     uint32          `json:"code"`
	Message  string          `json:"message"`
	Stream   bool            `json:"stream"`
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func load(path string) *protoregistry.Files {
	data, err := os.ReadFile(path)
	must(err)
	var set descriptorpb.FileDescriptorSet
	must(proto.Unmarshal(data, &set))
	files, err := protodesc.NewFiles(&set)
	must(err)
	return files
}

func message(files *protoregistry.Files, name string) *dynamicpb.Message {
	found, err := files.FindDescriptorByName(protoreflect.FullName(name))
	must(err)
	return dynamicpb.NewMessage(found.(protoreflect.MessageDescriptor))
}

func parsed(files *protoregistry.Files, name string, text json.RawMessage) *dynamicpb.Message {
	made := message(files, name)
	must(protojson.Unmarshal(text, made))
	return made
}

func perform(client *ttrpc.Client, files *protoregistry.Files, asked call) (*dynamicpb.Message, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	response := message(files, asked.Response)
	if !asked.Stream {
		return response, client.Call(ctx, asked.Service, asked.Method, parsed(files, asked.Request, asked.Messages[0]), response)
	}
	stream, err := client.NewStream(ctx, &ttrpc.StreamDesc{StreamingClient: true}, asked.Service, asked.Method, nil)
	if err != nil {
		return nil, err
	}
	for _, text := range asked.Messages {
		if err := stream.SendMsg(parsed(files, asked.Request, text)); err != nil {
			break // the server has answered already; its answer says why
		}
	}
	if err := stream.CloseSend(); err != nil && err != ttrpc.ErrStreamClosed {
		return nil, err
	}
	return response, stream.RecvMsg(response)
}

func client(socket string, files *protoregistry.Files) {
	connection, err := net.Dial("unix", socket)
	must(err)
	peer := ttrpc.NewClient(connection)
	defer peer.Close()
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var asked call
		must(json.Unmarshal(lines.Bytes(), &asked))
		response, err := perform(peer, files, asked)
		var told answer
		if err != nil {
			found := status.Convert(err)
			told.Code, told.Message = uint32(found.Code()), found.Message()
			for _, detail := range found.Proto().GetDetails() {
				told.Details = append(told.Details, detail.GetValue())
			}
		} else {
			told.Response, err = protojson.Marshal(response)
			must(err)
		}
		must(json.NewEncoder(os.Stdout).Encode(told))
	}
	must(lines.Err())
}

func outcome(files *protoregistry.Files, known method) (interface{}, error) {
	if known.Code != 0 {
		return nil, status.Error(codes.Code(known.Code), known.Message)
	}
	return parsed(files, known.Response, known.Answer), nil
}

func server(socket string, files *protoregistry.Files) {
	lines := bufio.NewReader(os.Stdin)
	text, err := lines.ReadBytes('\n')
	must(err)
	var methods []method
	must(json.Unmarshal(text, &methods))
	services := map[string]*ttrpc.ServiceDesc{}
	seen := json.NewEncoder(os.Stdout)
	for _, known := range methods {
		service := services[known.Service]
		if service == nil {
			service = &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{}, Streams: map[string]ttrpc.Stream{}}
			services[known.Service] = service
		}
		if known.Stream {
			service.Streams[known.Method] = ttrpc.Stream{StreamingClient: true, Handler: func(_ context.Context, stream ttrpc.StreamServer) (interface{}, error) {
				for {
					request := message(files, known.Request)
					if err := stream.RecvMsg(request); err == io.EOF {
						return outcome(files, known)
					} else if err != nil {
						return nil, err
					}
					report(seen, known.Method, request)
				}
			}}
			continue
		}
		service.Methods[known.Method] = func(_ context.Context, decode func(interface{}) error) (interface{}, error) {
			request := message(files, known.Request)
			if err := decode(request); err != nil {
				return nil, err
			}
			report(seen, known.Method, request)
			return outcome(files, known)
		}
	}
	listener, err := net.Listen("unix", socket)
	must(err)
	running, err := ttrpc.NewServer()
	must(err)
	for name, service := range services {
		running.RegisterService(name, service)
	}
	go func() {
		io.Copy(io.Discard, lines) // the test has closed our input: it is over
		os.Exit(0)
	}()
	running.Serve(context.Background(), listener)
}

func report(seen *json.Encoder, method string, request *dynamicpb.Message) {
	text, err := protojson.Marshal(request)
	must(err)
	var shown interface{}
	must(json.Unmarshal(text, &shown))
	must(seen.Encode(map[string]interface{}{"method": method, "bytes": proto.Size(request), "request": shortened(shown)}))
}

// shortened leaves long bytes out: the test reads us only after its call, and a full pipe would stop us before that.
func shortened(value interface{}) interface{} {
	switch found := value.(type) {
	case map[string]interface{}:
		for key, item := range found {
			found[key] = shortened(item)
		}
	case []interface{}:
		for index, item := range found {
			found[index] = shortened(item)
		}
	case string:
		if len(found) > 1000 {
			return "long"
		}
	}
	return value
}

func main() {
	if len(os.Args) != 4 || (os.Args[1] != "client" && os.Args[1] != "server") {
		must(fmt.Errorf("usage: peer client|server <socket> <descriptors>"))
	}
	files := load(os.Args[3])
	if os.Args[1] == "server" {
		server(os.Args[2], files)
	} else {
		client(os.Args[2], files)
	}
}
